"""What the workers' steps export to Prometheus, through Ray's metrics endpoint of each node."""

from ray.serve import metrics

from scheduler.task import StepReport

STEP_S = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]
DECISION_S = [1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1]
RELATIVE_ERROR = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]


class StepMetrics:
    """Metrics of one worker; Serve adds the tags that name its replica."""

    def __init__(self) -> None:
        self._step_s = metrics.Histogram(
            "xyserve_step_seconds", "How long a step took.", boundaries=STEP_S
        )
        self._decision_s = metrics.Histogram(
            "xyserve_step_decision_seconds",
            "How long planning a step took, which is part of it.",
            boundaries=DECISION_S,
        )
        self._error = metrics.Histogram(
            "xyserve_step_prediction_error",
            "Difference between predicted and measured time of a step, over the measured.",
            boundaries=RELATIVE_ERROR,
        )

    def observe(self, report: StepReport) -> None:
        """Count one step."""
        self._step_s.observe(report.measured_s)
        self._decision_s.observe(report.decided_s)
        self._error.observe(abs(report.plan.predicted_s / report.measured_s - 1))
