"""Sources of problems: every field form, every kind of file, and what is said about a bad row."""

import io
import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from smallmath_jax.data.images import load_image
from smallmath_jax.data.problems import load_problems


def png(width=30, height=20, color=(200, 30, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "PNG")
    return buffer.getvalue()


def write_lines(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return str(path)


def test_reads_every_form_of_a_row(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png())
    source = write_lines(
        tmp_path / "set.jsonl",
        [
            {
                "problem": "1+1?",
                "answer": "2",
                "unique_id": "train/1",
                "level": "Level 3",
                "subject": "Algebra",
            },
            {
                "question": "2+2?",
                "answer": 4,
                "id": 7,
                "level": 5,
                "solution": "2+2=4",
                "licence": "MIT",
            },
            {
                "question": "Q",
                "answer": "5 + 7 = <<5+7=12>>12 apples.\nSo $<<12*2=24>>24.\n#### 24",
            },
            {
                "question": "Which?\n<image1>",
                "answer": "B",
                "options": ["A", "two"],
                "image": "pictures/a.png",
            },
            "",
            {"problem": "one of them", "answer": ["3", "-3"], "level": "Level ?"},
            {
                "problem": "gold is missing",
                "answer": "",
                "solution": "",
                "options": [],
                "images": [],
            },
        ],
    )
    problems = load_problems(source)
    assert [problem.id for problem in problems] == [
        "train/1",
        "7",
        "set-2",
        "set-3",
        "set-4",
        "set-5",
    ]
    assert (problems[0].level, problems[0].subject, problems[0].answer) == (3, "Algebra", "2")
    assert (problems[1].level, problems[1].answer, problems[1].licence) == (5, "4", "MIT")
    assert problems[2].answer == "24"
    assert problems[2].solution == "5 + 7 = 12 apples.\nSo $24."
    assert problems[3].problem == "Which?\n<image>"
    assert problems[3].options == ("A", "two")
    assert problems[3].images == (str(tmp_path / "pictures" / "a.png"),)
    assert (problems[4].answer, problems[4].meta, problems[4].level) == (
        "3",
        {"accepted": ["3", "-3"]},
        None,
    )
    assert problems[5] == problems[5].__class__("set-5", "gold is missing", "", source="set")


@pytest.mark.parametrize("accepted", [True, "12", 3])
def test_a_rows_own_field_named_accepted_says_nothing_about_golds(tmp_path, accepted):
    row = {"problem": "3 * 4?", "answer": "12", "accepted": accepted, "year": 2024}
    (problem,) = load_problems(write_lines(tmp_path / "set.jsonl", [row]))
    assert problem.accepted == ("12",) and problem.meta == {"year": 2024}


def test_json_files_hold_a_list_or_an_object_with_one(tmp_path):
    rows = [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "object.json").write_text(json.dumps({"version": 1, "example": rows}))
    for name in ("list", "object"):
        problems = load_problems(str(tmp_path / f"{name}.json"))
        assert [problem.answer for problem in problems] == ["1", "2"]
    (tmp_path / "bad.json").write_text('[{"question": "a",\n "answer" "1"}]')
    with pytest.raises(ValueError, match=r"bad.json, line 2: not JSON"):
        load_problems(str(tmp_path / "bad.json"))
    (tmp_path / "text.json").write_text('"hello"')
    with pytest.raises(ValueError, match="neither a list of problems"):
        load_problems(str(tmp_path / "text.json"))


def test_parquet_keeps_inline_images_encoded(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    data = png()
    table = pa.table(
        {
            "id": ["a", "b"],
            "problem": ["see <image> and <image>", "none"],
            "answer": ["1", "2"],
            "options": [["x", "y"], []],
            "level": pa.array([2, None], pa.int64()),
            "images": [[{"bytes": data, "path": None}, {"bytes": data, "path": "x.png"}], []],
        }
    )
    pa.parquet.write_table(table, tmp_path / "set.parquet")
    first, second = load_problems(str(tmp_path / "set.parquet"))
    assert first.images == (data, data) and first.options == ("x", "y") and first.level == 2
    assert second.images == () and second.level is None
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ValueError, match="torn.parquet: not a Parquet file"):
        load_problems(str(tmp_path / "torn.parquet"))


BAD_ROWS = [
    ('{"problem": "a", "answer"', r"not a JSON object \(.*column \d+\); mend or delete"),
    ("[1, 2]", "a list, not an object"),
    ({"answer": "1"}, "field 'problem' or 'question': missing; there are answer"),
    ({"problem": "a"}, "field 'answer': missing"),
    ({"problem": "a", "answer": None}, "field 'answer': missing"),
    ({"problem": ["a"], "answer": "1"}, "field 'problem': a list, not text"),
    ({"problem": "  ", "answer": "1"}, "field 'problem': empty"),
    ({"problem": "a", "answer": {"x": 1}}, "field 'answer': a dict, not text"),
    ({"problem": "a", "answer": []}, "field 'answer': an empty list"),
    ({"problem": "a", "answer": "1", "level": 9}, "field 'level': 9 is no level; write 1 to 5"),
    ({"problem": "a", "answer": "1", "level": True}, "field 'level': True is no level"),
    ({"problem": "a", "answer": "1", "id": [1]}, "field 'id': a list"),
    ({"problem": "a", "answer": "1", "options": "x"}, "field 'options': a str, not a list"),
    ({"problem": "a", "answer": "1", "options": [["x"]]}, "field 'options': a list, not text"),
    (
        {"problem": "a", "answer": "1", "image": "gone.png"},
        r"field 'image': no image file .*gone.png",
    ),
    (
        {"problem": "a", "answer": "1", "image": "notes.txt"},
        "field 'image': .*notes.txt cannot be read as an image",
    ),
    ({"problem": "a", "answer": "1", "image": 3}, "field 'image': a int, not a path"),
    ({"problem": "a", "answer": "1", "image": "https://x.org/a.png"}, "is a URL; download it"),
    (
        {"problem": "a", "answer": "1", "image": ["a.png", "a.png"]},
        "several images go into 'images'",
    ),
    ({"problem": "<image>", "answer": "1"}, "1 <image> marks in the text and 0 images"),
    ({"problem": "<image1>", "answer": "1"}, "the row has no image"),
    ({"problem": "<image1> <image>", "answer": "1", "image": "a.png"}, "use one kind"),
    (
        {"problem": "<image1><image2>", "answer": "1", "images": ["a.png"] * 3},
        "2 numbered image marks and 3",
    ),
    ({"problem": "<image2><image1>", "answer": "1", "images": ["a.png"] * 2}, "number them 1 to 2"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=lambda value: str(value)[:40])
def test_a_bad_row_names_file_line_field_and_remedy(tmp_path, row, message):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "notes.txt").write_text("no image")
    source = write_lines(tmp_path / "set.jsonl", [{"problem": "fine", "answer": "1"}, row])
    with pytest.raises(ValueError, match=rf"(?s)set\.jsonl, line 2: .*{message}"):
        load_problems(source)


def test_all_bad_rows_are_told_at_once_also_those_a_limit_leaves_out(tmp_path):
    rows = [{"problem": "p", "answer": "1"}] + [{"problem": "p"} for _ in range(14)]
    source = write_lines(tmp_path / "set.jsonl", rows)
    with pytest.raises(ValueError) as caught:
        load_problems(source, limit=1)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11 and "line 11" in lines[9] and lines[10] == "... and 4 more bad rows"


def test_duplicate_ids_name_both_places(tmp_path):
    rows = [{"id": "x", "problem": str(index), "answer": "1"} for index in range(2)]
    source = write_lines(tmp_path / "set.jsonl", rows)
    with pytest.raises(ValueError, match=r"line 2: field 'id': 'x' is used before, at .*line 1"):
        load_problems(source)


def test_files_that_are_empty_missing_or_no_text(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_problems(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="no problems in it"):
        load_problems(str(tmp_path / "empty.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(
        b'{"problem": "a", "answer": "1"}\n{"problem": "\xe9"}\n'
    )
    with pytest.raises(ValueError, match="latin.jsonl, line 2: not UTF-8"):
        load_problems(str(tmp_path / "latin.jsonl"))
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"problem": "a", "answer": "1"}')
    assert load_problems(str(tmp_path / "bom.jsonl"))[0].problem == "a"
    line_separator = json.dumps({"problem": "a\u2028b", "answer": "1"}, ensure_ascii=False)
    source = write_lines(tmp_path / "separator.jsonl", [line_separator])
    assert load_problems(source)[0].problem == "a\u2028b"  # only \n ends a line


def test_mapping_renames_and_ignores_fields(tmp_path):
    rows = [{"Q": "a", "problem": "not this", "final": "1", "level": "hard"}]
    source = write_lines(tmp_path / "set.jsonl", rows)
    problem = load_problems(source, problem="Q", answer="final", level=None)[0]
    assert (problem.problem, problem.answer, problem.level) == ("a", "1", None)
    assert problem.meta == {"problem": "not this"}
    with pytest.raises(ValueError, match="field 'gold': missing; there are Q"):
        load_problems(source, problem="Q", answer="gold")
    with pytest.raises(ValueError, match="no such field to map: answr"):
        load_problems(source, answr="final")


def test_limit_is_a_sample_that_depends_on_the_seed_alone(tmp_path):
    rows = [{"problem": str(index), "answer": "1"} for index in range(50)]
    source = write_lines(tmp_path / "set.jsonl", rows)
    pick = lambda **options: [int(p.problem) for p in load_problems(source, **options)]
    assert pick(limit=10) == pick(limit=10, seed=0) == sorted(pick(limit=10))
    assert pick(limit=10) != list(range(10)) and pick(limit=10) != pick(limit=10, seed=1)
    assert set(pick(limit=10)) < set(pick(limit=20)) and pick(limit=99) == list(range(50))


def test_numbered_marks_of_one_joined_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    row = {"problem": "x <image1> y <image2> z <image1>", "answer": "1", "image": "a.png"}
    problem = load_problems(write_lines(tmp_path / "set.jsonl", [row]))[0]
    assert problem.problem == "x <image> y (picture 2) z (picture 1)"
    row = {"problem": "x <image1> y <image2> z <image1>", "answer": "1", "images": ["a.png"] * 2}
    problem = load_problems(write_lines(tmp_path / "set.jsonl", [row]))[0]
    assert problem.problem == "x <image> y <image> z (picture 1)"


def test_unknown_sources_get_the_nearest_name():
    with pytest.raises(ValueError, match="unknown source 'maths500'; did you mean math500"):
        load_problems("maths500")
    with pytest.raises(ValueError, match="tiny:tset: no such split, did you mean tiny:test"):
        load_problems("tiny:tset")
    with pytest.raises(
        ValueError, match="unknown set convert:geometry_3k; did you mean convert:geometry3k"
    ):
        load_problems("convert:geometry_3k")


def test_embedded_problems():
    problems = load_problems("tiny:test", limit=5)
    assert len(problems) == 5 and problems == load_problems("tiny", split="test", limit=5)


def test_hub_sets_from_a_local_folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = png()
    rows = {
        "question": ["a", "b", "c"],
        "answer": ["1", "2", "3"],
        "image": [{"bytes": data, "path": None}] * 3,
        "pictures": [[{"bytes": data, "path": None}]] * 3,
    }
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "image": datasets.Image(),
            "pictures": datasets.Sequence(datasets.Image()),
        }
    )
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(str(folder / "train-00000.parquet"))
    table.select([0]).to_parquet(str(folder / "test-00000.parquet"))
    source = f"hf:{tmp_path / 'set'}"
    problems = load_problems(source)
    assert [problem.id for problem in problems] == ["set-0", "set-1", "set-2"]
    assert problems[0].images == (data,)  # not decoded, not encoded again
    assert load_problems(source, images="pictures")[2].images == (data,)
    assert len(load_problems(source, split="test")) == len(load_problems(f"{source}::test")) == 1
    assert len(load_problems(source, limit=2)) == 2
    with pytest.raises(ValueError, match="The form is hf:NAME:CONFIG:SPLIT"):
        load_problems(f"{source}::nothing")
    with pytest.raises(ValueError, match=r"hf:.*set, row 1: field 'gold': missing"):
        load_problems(source, answer="gold")


def tfds_builder():
    import tensorflow_datasets as tfds

    class SmallProblems(tfds.core.GeneratorBasedBuilder):
        name = "small_problems"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "question": tfds.features.Text(),
                "answer": tfds.features.Text(),
                "level": tfds.features.Scalar(np.int64),
                "options": tfds.features.Sequence(tfds.features.Text()),
                "image": tfds.features.Image(shape=(None, None, 3)),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(4), "test": self._generate_examples(1)}

        def _generate_examples(self, count):
            for index in range(count):
                yield (
                    index,
                    {
                        "question": f"é {index}?",
                        "answer": str(index),
                        "level": index + 1,
                        "options": ["x", "y"],
                        "image": io.BytesIO(png(9 + index, 8)),
                    },
                )

    return SmallProblems


@pytest.mark.filterwarnings("ignore")  # TFDS' own
def test_tfds_sets_without_tensorflow(tmp_path):
    builder = tfds_builder()(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    source = f"tfds:{builder.data_dir}"
    problems = load_problems(source)
    assert sorted(problem.problem for problem in problems) == [f"é {index}?" for index in range(4)]
    for problem in problems:
        index = int(problem.answer)
        assert (problem.level, problem.options) == (index + 1, ("x", "y"))
        with Image.open(io.BytesIO(problem.images[0])) as image:
            assert image.size == (9 + index, 8)
    assert len(load_problems(source, split="test")) == 1
    with pytest.raises(ValueError, match="no split 'tset', there are"):
        load_problems(source, split="tset")
    with pytest.raises(ValueError, match="file_format='array_record'"):
        load_problems(f"tfds:{tmp_path}/nothing")
    with pytest.raises(
        ValueError, match=r"none of TFDS' \d+ sets is named 'ai2_ark'. Did you mean ai2_arc"
    ):
        load_problems("tfds:ai2_ark")


@pytest.mark.filterwarnings("ignore")  # gcsfs' and the emulator's own
def test_files_and_pictures_on_gs(monkeypatch):
    from gcp_storage_emulator.server import create_server

    server = create_server("localhost", 0, in_memory=True, default_bucket="problems")
    server.start()
    try:
        port = server._api._httpd.server_port
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
        root = epath.Path("gs://problems/sets")
        (root / "a.png").write_bytes(png())
        row = {"problem": "a", "answer": "1", "image": "a.png"}
        (root / "set.jsonl").write_text(
            json.dumps(row) + "\n" + json.dumps(row | {"image": "b.png"})
        )
        with pytest.raises(ValueError, match="line 2: field 'image': no image file gs://problems"):
            load_problems("gs://problems/sets/set.jsonl")
        (root / "set.jsonl").write_text(json.dumps(row))
        problem = load_problems("gs://problems/sets/set.jsonl")[0]
        assert problem.images == ("gs://problems/sets/a.png",)
        assert load_image(problem.images[0]).shape == (20, 30, 3)
    finally:
        server.stop()
