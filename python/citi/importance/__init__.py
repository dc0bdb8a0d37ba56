"""Which components of a model matter for an ability, from one forward and backward per batch.

    scoring_batch → scoring_pass → recorder → totals → component_scores → ability_scores

`scoring_pass` has the loss, `recorder` the model whose linear modules run through
`citi_kernels`' scored linear, `totals` the sums, `ability_scores` the data files.
"""

from citi.importance.component_scores import ComponentScores
from citi.importance.granularity import ESTIMATORS, GRANULARITIES
from citi.importance.recorder import ImportanceRecorder
from citi.importance.scoring_pass import Progress, component_importance
from citi.importance.totals import BatchCounts

__all__ = [
    "ESTIMATORS",
    "GRANULARITIES",
    "BatchCounts",
    "ComponentScores",
    "ImportanceRecorder",
    "Progress",
    "component_importance",
]
