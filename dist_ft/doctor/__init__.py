"""What this machine offers and what would break a run, each with its remedy."""

from dist_ft.doctor.findings import Finding, print_findings
from dist_ft.doctor.probes import examine, examine_node, examine_rank, folders_of

__all__ = [
    "Finding",
    "examine",
    "examine_node",
    "examine_rank",
    "folders_of",
    "print_findings",
]
