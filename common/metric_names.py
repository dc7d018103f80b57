"""Names of the metrics that the gate writes into its evidence and the sidecar exposes of that same evidence.

Every other name stands in full where its metric is made: `monitoring/metrics.py`, `serving/gateway/metrics.py`,
`gating/formats/openmetrics.py`.
"""

from __future__ import annotations

from typing import NamedTuple


class Interval(NamedTuple):
    """A share, 0 to 1, and its bounds: three metrics, because a label for the bound would make sums meaningless."""

    ratio: str
    lower: str
    upper: str


GATE_STATE = "robustness_gate_state"
GATE_EVALUATED = "robustness_gate_evaluated_timestamp_seconds"
GATE_THRESHOLD = "robustness_gate_threshold_ratio"
GATE_CLEAN_THRESHOLD = "robustness_gate_clean_threshold_ratio"
GATE_ACCURACY = Interval(
    "robustness_gate_accuracy_ratio", "robustness_gate_accuracy_lower_ratio", "robustness_gate_accuracy_upper_ratio"
)
GATE_CLEAN_ACCURACY = Interval(
    "robustness_gate_clean_accuracy_ratio",
    "robustness_gate_clean_accuracy_lower_ratio",
    "robustness_gate_clean_accuracy_upper_ratio",
)
GATE_TRANSFER_ACCURACY = Interval(
    "robustness_gate_transfer_accuracy_ratio",
    "robustness_gate_transfer_accuracy_lower_ratio",
    "robustness_gate_transfer_accuracy_upper_ratio",
)
