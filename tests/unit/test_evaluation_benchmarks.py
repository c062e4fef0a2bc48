"""Benchmark files in the layouts that their authors publish, with questions of our own making; and what is wrong with one is said."""

from __future__ import annotations

import base64
import csv
import hashlib
import json

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from webdancer.errors import DataError
from webdancer.evaluation.benchmarks import BENCHMARKS, load_benchmark, size_note
from webdancer.evaluation.ciphers import decrypt, encrypt, seal, unseal

CANARY = "of our own making: 7f0c"


def by_hand(text, canary, *, hashed):
    """The ciphers as their papers' scripts have them, written down a second time."""
    key = hashlib.sha256(canary.encode()).digest() if hashed else canary.encode()
    data = text.encode()
    return base64.b64encode(bytes(byte ^ key[index % len(key)] for index, byte in enumerate(data))).decode()


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_xlsx(path, rows):
    book = openpyxl.Workbook()
    book.active.append(list(rows[0]))
    for row in rows:
        book.active.append(list(row.values()))
    book.save(path)
    return path


def browsecomp_rows(count=2, canary=CANARY):
    return [
        {
            "problem": by_hand(f"Which school, {index}?\nLine two: 学校", canary, hashed=True),
            "answer": by_hand(f"Bana {index}", canary, hashed=True),
            "problem_topic": "Other",
            "canary": canary,
        }
        for index in range(count)
    ]


def test_gaia_as_the_papers_have_it_and_as_the_hub_has_it(tmp_path):
    rows = [
        {"task_id": "a", "Question": "One?", "answer": "1", "Level": 1},
        {"task_id": "b", "Question": "Two?", "answer": "2", "Level": 3},
    ]
    (tmp_path / "dev.json").write_text(json.dumps(rows))
    first, second = load_benchmark("gaia", str(tmp_path / "dev.json"))
    assert (first.id, first.question, first.answers, first.source, first.metadata) == ("a", "One?", ("1",), "gaia", {"level": "1"})
    assert second.metadata == {"level": "3"}
    published = [
        {"task_id": "a", "Question": "One?", "Level": "1", "Final answer": "1", "file_name": "", "Annotator Metadata": {"Steps": "1"}},
        {
            "task_id": "c",
            "Question": "Look!",
            "Level": "2",
            "Final answer": "x",
            "file_name": "c.png",
            "Annotator Metadata": {"Steps": "2"},
        },
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(published), tmp_path / "metadata.parquet")
    (only,) = load_benchmark("gaia", str(tmp_path / "metadata.parquet"))
    assert (only.id, only.answers) == ("a", ("1",)), "a question with a file is not text only"
    assert "papers report on 103" in size_note("gaia", 1)
    assert size_note("gaia", 103) == size_note("jsonl", 7) == ""


def test_webwalkerqa(tmp_path):
    info = {
        "domain": "Conference",
        "source_website": ["u"],
        "golden_path": ["p"],
        "type": "multi_source",
        "difficulty_level": "hard",
        "lang": "en",
    }
    old = {
        "Question": "Wo?",
        "Answer": "Dort.",
        "Root_Url": "u",
        "Info": {"Hop": "single-source", "Language": "English", "Difficulty_Level": "Easy"},
    }
    path = write_jsonl(tmp_path / "main.jsonl", [{"question": "Where?", "answer": "There.", "root_url": "u", "info": info}, old])
    new, older = load_benchmark("webwalkerqa", str(path))
    assert new.metadata == {"type": "multi_source", "difficulty": "hard", "language": "en", "domain": "Conference"}
    assert older.metadata == {"type": "single-source", "difficulty": "Easy", "language": "English"}
    assert new.id != older.id


def test_browsecomp_is_decrypted_in_memory(tmp_path):
    path = write_csv(tmp_path / "browse_comp_test_set.csv", browsecomp_rows())
    before = path.read_bytes()
    first, _ = load_benchmark("browsecomp", str(path))
    assert (first.question, first.answers) == ("Which school, 0?\nLine two: 学校", ("Bana 0",))
    assert first.metadata == {"topic": "Other", "canary": CANARY}
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "nothing is written"


def test_browsecomp_zh_is_a_workbook(tmp_path):
    rows = [
        {
            "Topic": by_hand("影视", CANARY, hashed=True),
            "Question": by_hand("谁？", CANARY, hashed=True),
            "Answer": by_hand("甲", CANARY, hashed=True),
        }
        | {"canary": CANARY}
    ]
    (task,) = load_benchmark("browsecomp-zh", str(write_xlsx(tmp_path / "browsecomp-zh-encrypted.xlsx", rows)))
    assert (task.question, task.answers, task.metadata) == ("谁？", ("甲",), {"topic": "影视", "canary": CANARY})


def test_xbench_has_another_cipher(tmp_path):
    rows = [
        {
            "id": str(index),
            "prompt": by_hand("几？", CANARY, hashed=False),
            "answer": by_hand("3", CANARY, hashed=False),
            "reference_steps": "",
            "canary": CANARY,
        }
        for index in (1, 2)
    ]
    first, second = load_benchmark("xbench-deepsearch", str(write_csv(tmp_path / "DeepSearch.csv", rows)))
    assert (first.id, second.id, first.question, first.answers) == ("1", "2", "几？", ("3",))


def test_simpleqa_writes_its_metadata_as_python_does(tmp_path):
    rows = [{"metadata": "{'topic': 'Art', 'answer_type': 'Person', 'urls': ['https://x']}", "problem": "Who?", "answer": "Bana"}]
    (task,) = load_benchmark("simpleqa", str(write_csv(tmp_path / "simple_qa_test_set.csv", rows)))
    assert task.metadata == {"type": "Person", "topic": "Art"}


def test_search_r1s_sets_in_both_forms(tmp_path):
    flash = [
        {"id": "dev_0", "question": "Who?", "golden_answers": ["Bana", "Bana School"], "metadata": {"type": "bridge", "level": "hard"}}
    ]
    (task,) = load_benchmark("hotpotqa", str(write_jsonl(tmp_path / "dev.jsonl", flash)))
    assert (task.id, task.answers, task.metadata) == ("dev_0", ("Bana", "Bana School"), {"type": "bridge", "level": "hard"})
    table = [
        {
            "id": f"test_{index}",
            "question": f"Q{index}?",
            "golden_answers": ["x"],
            "data_source": source,
            "reward_model": {"ground_truth": {"target": ["x"]}},
        }
        for index, source in enumerate(["nq", "musique", "bamboogle", "musique"])
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "test.parquet")
    assert [task.id for task in load_benchmark("musique", str(tmp_path / "test.parquet"))] == ["test_1", "test_3"]
    assert len(load_benchmark("bamboogle", str(tmp_path / "test.parquet"))) == 1


def test_any_questions_of_ones_own(tmp_path):
    path = write_jsonl(tmp_path / "own.jsonl", [{"question": "Q?", "answer": ["x", "y"], "tag": "mine", "metadata": {"level": 2}}])
    (task,) = load_benchmark("jsonl", str(path))
    assert (task.answers, task.source, task.metadata) == (("x", "y"), "mine", {"level": 2})


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        (
            "gaia",
            "x.json",
            '[{"task_id": "a", "Question": "One?"}]',
            r"x\.json, row 1: Final answer or answer: must be there.*the columns are task_id, Question",
        ),
        ("gaia", "x.json", '[{"task_id": "a", "Question": "", "answer": "1"}]', "row 1: Question or question: must be there"),
        ("gaia", "x.json", '[{"task_id": "a", "Question": 7, "answer": "1"}]', "row 1: Question or question: must be a text, got a int"),
        ("gaia", "x.json", '[{"task_id": "a", "Question": "One?", "answer": {"x": 1}}]', "must be an answer or a list of them, got a dict"),
        (
            "gaia",
            "x.json",
            '[{"task_id": "a", "Question": "1?", "answer": "1"}, {"task_id": "a", "Question": "2?", "answer": "2"}]',
            r"row 2: id: must be unique, got 'a' again \(first in .*row 1\)",
        ),
        ("gaia", "x.json", "{}", "must be a list of rows"),
        ("gaia", "x.json", "[]", "must be a list of rows, got an empty one"),
        ("gaia", "x.json", "[1]", "row 1: must be an object, got int"),
        ("gaia", "x.json", '[{"task_id": "a", "Question": "1?", "answer": "1", "file_name": "a.png"}]', "must have questions of gaia"),
        ("gaia", "x.txt", "x", "must be one of .jsonl, .json, .csv, .parquet, .xlsx, got '.txt'"),
        ("gaia", "x.parquet", "not one", "must be a parquet file"),
        ("browsecomp-zh", "x.xlsx", "not one", "must be a workbook"),
        ("gaia", "x.json", '[{"task_id": "a", "Question": "1?", "answer": "?"}]', r"row 1: .*must be published, got '\?'; use a split"),
        ("simpleqa", "x.csv", 'problem,answer\n"' + "x" * 140_000, "x.csv: must be CSV, got: field larger"),
        ("browsecomp", "x.csv", "problem,answer\n", "must have at least one row below its header"),
        ("browsecomp", "x.csv", "problem,answer\nYQ==,YQ==\n", "row 1: canary: must be the key of the row, got nothing"),
        ("browsecomp", "x.csv", "problem,answer,canary\nplain text,YQ==,k\n", "row 1: problem: must be base64 of text encrypted"),
        ("browsecomp", "x.csv", "problem,answer,canary\nYQ==,k\n", "row 1: must have as many fields as the header, got fewer"),
        ("simpleqa", "x.csv", "metadata,question,answer\n{},Who?,x\n", "row 1: problem: must be there"),
        ("jsonl", "x.jsonl", '{"question": "Q?"}\n', "line 1: answer: must be"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_with_its_place(tmp_path, name, file, content, message):
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_benchmark(name, str(tmp_path / file))
    assert "\n" not in str(caught.value)


def test_a_wrong_key_gives_no_text_and_shows_none(tmp_path):
    rows = [row | {"canary": "another key"} for row in browsecomp_rows()]
    with pytest.raises(DataError, match="row 1: problem: must be base64 of text encrypted") as caught:
        load_benchmark("browsecomp", str(write_csv(tmp_path / "x.csv", rows)))
    assert rows[0]["problem"] not in str(caught.value)


def test_rows_that_are_the_same_keep_apart(tmp_path):
    row = browsecomp_rows(1)[0]
    first, second = load_benchmark("browsecomp", str(write_csv(tmp_path / "x.csv", [row, row])))
    assert second.id == f"{first.id}-2"


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("nothing", "", "evaluation.benchmark: must be one of gaia"),
        ("gaia", "", "evaluation.data: must name the file of gaia"),
        ("jsonl", "", "evaluation.data: must name a file"),
        ("gaia", "/no/such/file.json", "evaluation.data: must be a file, owner/name"),
        ("gaia", "owner/name", "evaluation.data: must be a file, owner/name"),
        ("gaia", "hf://datasets/owner", "evaluation.data: must be a file, owner/name"),
    ],
)
def test_a_file_that_is_not_there(name, source, message):
    with pytest.raises(DataError, match=message):
        load_benchmark(name, source)


def test_the_hub_is_asked_for_the_published_file(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    path = write_jsonl(tmp_path / "dev.jsonl", [{"id": "1", "question": "Q?", "golden_answers": ["x"]}])

    def download(repository, file, *, repo_type):
        asked.append((repository, file, repo_type))
        if repository == "gone/gone":
            raise OSError("404\nnot found")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    load_benchmark("musique")
    load_benchmark("musique", "my/fork")
    load_benchmark("musique", "hf://datasets/my/fork/a/b.jsonl")
    flash = ("RUC-NLPIR/FlashRAG_datasets", "musique/dev.jsonl", "dataset")
    assert asked == [flash, ("my/fork", "musique/dev.jsonl", "dataset"), ("my/fork", "a/b.jsonl", "dataset")]
    with pytest.raises(DataError, match=r"evaluation\.data: must be what the hub gives, got hf://datasets/gone/gone"):
        load_benchmark("musique", "gone/gone")


@given(st.text(), st.text(min_size=1), st.sampled_from(["sha256", "raw"]))
def test_the_ciphers_are_those_of_the_papers(text, canary, cipher):
    canary = canary.encode(errors="ignore").decode() or "k"
    text = text.encode(errors="ignore").decode()
    assert encrypt(text, canary, cipher) == by_hand(text, canary, hashed=cipher == "sha256")
    assert decrypt(encrypt(text, canary, cipher), canary, cipher) == text


def test_a_sealed_row_holds_no_plain_text():
    fields = {"question": "Which school?", "messages": [{"role": "user", "content": "Which school?"}]}
    row = {"id": "1", **seal(fields, CANARY)}
    assert "school" not in json.dumps(row)
    assert unseal(row) == {"id": "1", **fields}
    assert unseal({"id": "1"}) == {"id": "1"}


def test_every_encrypted_benchmark_seals():
    assert {name for name, benchmark in BENCHMARKS.items() if benchmark.cipher} == {"browsecomp", "browsecomp-zh", "xbench-deepsearch"}
