"""All stages, in the order they run. A new stage is one file in this folder and one line here."""

from __future__ import annotations

from pipelines.stages.baselines import CODEC_TEACHER, INDIVIDUAL, LOCAL
from pipelines.stages.evaluate import EVALUATE
from pipelines.stages.prepare import PREPARE
from pipelines.stages.register import REGISTER
from pipelines.stages.spec import Stage
from pipelines.stages.stage1 import STAGE1
from pipelines.stages.stage2 import STAGE2
from pipelines.stages.teacher import TEACHER

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        PREPARE,
        TEACHER,
        STAGE1,
        STAGE2,
        LOCAL,
        INDIVIDUAL,
        CODEC_TEACHER,
        EVALUATE,
        REGISTER,
    )
}
