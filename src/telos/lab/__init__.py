"""``telos compare``: the command, the leaderboard and the report."""

from telos.lab.leaderboard import conclusion, frame, rows, table
from telos.lab.report import render, write_report
from telos.trials import Comparison, compare

__all__ = ["Comparison", "compare", "conclusion", "frame", "render", "rows", "table", "write_report"]
