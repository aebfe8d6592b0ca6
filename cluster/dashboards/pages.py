"""All dashboards."""

from cluster.dashboards.overview import OVERVIEW
from cluster.dashboards.placement import PLACEMENT
from cluster.dashboards.speculation import SPECULATION
from cluster.dashboards.steps import STEPS

DASHBOARDS = (OVERVIEW, STEPS, PLACEMENT, SPECULATION)
"""All of them."""
