"""The names of the methods that place experts.

They are apart from the solvers (``group.METHODS``), so that a command shows them without loading the solvers.
"""

from typing import Literal

MethodName = Literal["alternating", "cross_entropy", "exflow", "moetuner", "load", "uniform", "random"]
DEFAULT: MethodName = "alternating"
