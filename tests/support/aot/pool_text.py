"""Reads in the compiler's text what a compiled step does with arrays of a page pool's size.

Updates of a slice, and scatters, are in place if they go into an array that is an argument of the step. They
stand alone, as the root of a fusion, in the body of a loop, or in a kernel that says which operand its result
is. Everything else that makes an array of that size walks over the pool. The text does not say that an update
in place needs no second buffer: ``memory_analysis`` does, whose temporary bytes are then far below a pool's.
"""

import re

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ((?:\((?:[^()]|\([^()]*\))*\)|\S+)) ([\w\-]+)\((.*)$")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
ARRAY = re.compile(r"[a-z]+[0-9]*[a-z0-9]*\[([0-9,]*)\]")
MOVES_NOTHING = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional"}
UPDATES = {"dynamic-update-slice", "scatter"}


def _most(kind: str) -> int:
    """Returns the number of elements of the largest array of a type."""
    sizes = [1]
    for dims in ARRAY.findall(kind):
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        sizes.append(count)
    return max(sizes)


def _computations(text: str) -> dict[str, dict[str, tuple[str, str, str]]]:
    """Returns (type, operation, the rest of the line) of each instruction of each computation, by name.

    The root comes last.
    """
    found: dict[str, dict[str, tuple[str, str, str]]] = {}
    own: dict[str, tuple[str, str, str]] = {}
    root = None
    for line in text.splitlines():
        if begun := COMPUTATION.match(line):
            own = found[begun[1]] = {}
            root = None
        elif made := INSTRUCTION.match(line):
            own[made[1]] = made[2], made[3], made[4]
            root = made[1] if line.lstrip().startswith("ROOT ") else root
        elif line.startswith("}") and root is not None:
            own[root] = own.pop(root)
    return found


def _operands(rest: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", rest.split(")")[0])


def _is_update(own: dict[str, tuple[str, str, str]], name: str) -> bool:
    """Returns whether an instruction of a fusion updates in place one of the fusion's arguments."""
    _, operation, rest = own[name]
    if operation == "bitcast":
        return _is_update(own, _operands(rest)[0])
    if operation not in UPDATES:
        return False
    into = _operands(rest)[0]
    while own[into][1] == "bitcast":
        into = _operands(own[into][2])[0]
    return own[into][1] == "parameter"


def _updates(own: dict[str, tuple[str, str, str]], elements: int) -> bool:
    """Returns whether all of a fusion's results of that size are updates in place."""
    root = list(own)[-1]
    results = _operands(own[root][2]) if own[root][1] == "tuple" else [root]
    return all(_is_update(own, name) for name in results if _most(own[name][0]) >= elements)


def walks(text: str, elements: int) -> list[str]:
    """Returns the instructions that make an array of ``elements`` or more and are no update in place."""
    computations = _computations(text)
    calls = re.compile(r"calls=%?([\w.\-]+)")
    every = [made for own in computations.values() for made in own.values()]
    fused = {calls.search(rest)[1] for _, operation, rest in every if operation == "fusion"}
    found = []
    for computation in computations.keys() - fused:
        for name, (kind, operation, rest) in computations[computation].items():
            if _most(kind) < elements or operation in MOVES_NOTHING | UPDATES:
                continue
            if operation == "custom-call" and "output_to_operand_aliasing" in rest:
                continue
            if operation == "fusion" and _updates(computations[calls.search(rest)[1]], elements):
                continue
            found.append(f"{name}: {kind} {operation}")
    return found
