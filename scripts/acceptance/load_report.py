"""Checks the report of a load generator.  python load_report.py KIND FILE BASE

Every request succeeded with the requested tokens, and no request runs in the server any more.
"""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checks import frees


def guidellm(path: Path) -> str:
    (benchmark,) = json.loads(path.read_text())["benchmarks"]
    requests = benchmark["metrics"]["request_totals"]
    assert (requests["successful"], requests["errored"]) == (40, 0), requests
    tokens = benchmark["metrics"]["output_token_count"]["successful"]["mean"]
    assert tokens == 16, tokens
    return "40 requests of 40, 16 tokens each"


def aiperf(folder: Path) -> str:
    report = json.loads((folder / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == 40, report["request_count"]
    assert "jmoe_num_requests_running" in (folder / "server_metrics_export.json").read_text()
    first: dict[str, Any] = report["time_to_first_token"]
    return (
        f"40 requests of 40, first token after {first['avg']:.0f} {first['unit']}, our metrics in its report"
    )


def vllm(path: Path) -> str:
    report = json.loads(path.read_text())
    assert (report["completed"], report.get("failed", 0), report["total_output_tokens"]) == (40, 0, 640), (
        report
    )
    return f"40 requests of 40, 640 tokens, {report['request_throughput']:.1f} requests/s"


def locust(path: Path) -> str:
    with path.open(newline="") as file:
        total = next(row for row in csv.DictReader(file) if row["Name"] == "Aggregated")
    assert int(total["Failure Count"]) == 0 < int(total["Request Count"]), total
    return f"{total['Request Count']} requests, none failed"


def inspect(folder: Path) -> str:
    report = json.loads(max(folder.glob("*.json"), key=lambda p: p.stat().st_mtime).read_text())
    assert report["status"] == "success", report["status"]
    value = report["results"]["scores"][0]["metrics"]["accuracy"]["value"]
    assert value == 1, value
    return "2 samples of 2 answered"


REPORTS: dict[str, Callable[[Path], str]] = {f.__name__: f for f in (guidellm, aiperf, vllm, locust, inspect)}

if __name__ == "__main__":
    kind, file, base = sys.argv[1:]
    line = REPORTS[kind](Path(file))
    assert frees(base), "requests are left in the server"
    print(line)
