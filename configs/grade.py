"""Grade answers: JSONL {id, gold, pred} -> WORKDIR/verdicts.jsonl {id, verdict, extracted}, in the same order.

    python run.py --config=configs/grade.py --config.pairs=FILE
    python run.py --config=configs/grade.py --config.pairs=FILE --config.bare=true

`pred` is a model's raw text, or with `bare` the answer alone. Needs no accelerator.
"""

from ml_collections import ConfigDict


def get_config(mode=None):
    if mode:
        raise ValueError(f"grading has no modes; leave {mode!r} out")
    config = ConfigDict()
    config.task = "grade"
    config.mode = "pairs"
    config.pairs = ""
    config.bare = False
    config.extraction = "strict"  # strict | lenient
    return config
