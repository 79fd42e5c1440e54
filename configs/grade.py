"""Grade answers: a JSONL file of {"id", "gold", "pred"} into WORKDIR/verdicts.jsonl of {"id", "verdict", "extracted"}.

    python run.py --config=configs/grade.py --config.pairs=FILE [--config.bare=true]
    python run.py --config=configs/grade.py:lenient --config.pairs=FILE

`pred` is a completion as the model wrote it, or, with bare, the answer itself. Modes: strict (default: the answer tag
or the box, as in training), lenient (also "the answer is", the last formula, the last number), tiny (strict).
About a thousand pairs a second on one core; nothing is downloaded and no accelerator is used.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(mode=None):
    config = ConfigDict()
    config.task = "grade"
    config.mode = common.check_mode(mode, ("strict", "lenient", "tiny"), "strict")
    config.pairs = ""  # a JSONL file, local or gs://
    config.bare = False  # `pred` is the answer itself, not a completion
    return config
