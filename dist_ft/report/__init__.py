"""What a run did, as one page that needs nothing else."""

from dist_ft.report.page import write_report

__all__ = ["write_report"]
