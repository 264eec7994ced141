"""Tables and plots from the files of a run's folder, and from nothing else."""

from lit_tricks.reports.fit import report_fit

__all__ = ["report_fit"]
