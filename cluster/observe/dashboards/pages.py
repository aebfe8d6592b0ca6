"""The list of all dashboards."""

from cluster.observe.dashboards.overview import OVERVIEW
from cluster.observe.dashboards.placement import PLACEMENT
from cluster.observe.dashboards.speculation import SPECULATION
from cluster.observe.dashboards.steps import STEPS

DASHBOARDS = (OVERVIEW, STEPS, PLACEMENT, SPECULATION)
