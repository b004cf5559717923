"""``telos compare``: the command, the result, the leaderboard and the report."""

from telos.lab.leaderboard import conclusion, frame, rows, suite_frame, table, write_table
from telos.lab.report import render, write_report
from telos.lab.result import Result, compare, load
from telos.trials import Comparison, Suite

__all__ = [
    "Comparison",
    "Result",
    "Suite",
    "compare",
    "conclusion",
    "frame",
    "load",
    "render",
    "rows",
    "suite_frame",
    "table",
    "write_report",
    "write_table",
]
