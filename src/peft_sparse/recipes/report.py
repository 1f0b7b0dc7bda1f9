"""The report of a compression: the report of its run, whose stages are measured."""

from ..reporting import RunReport as CompressionReport
from ..reporting import Stage


__all__ = ["CompressionReport", "Stage"]
