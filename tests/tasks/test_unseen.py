"""What searches chose by is left out of scores: which tasks these are, and that the command says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from opmix_dist.cli import main
from opmix_dist.data.builtin_chat import TEMPLATE
from opmix_dist.data.tokenizer import train_tokenizer
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir, write_record
from opmix_dist.exchange.searched_tasks import FILE, SearchedTasks
from opmix_dist.tasks.records import Task
from opmix_dist.tasks.unseen import Unseen, searched_digests
from tests.models import tiny
from tests.report.runs import RunWriter

TASKS = [
    Task(kind="exact_match", messages=[{"role": "user", "content": f"Say {n}"}], answer=str(n), group="g")
    for n in range(6)
]


def searched(path: Path, tasks: list[Task], start: Path | None = None) -> RunDir:
    """A run with a search that chose by ``tasks``."""
    settings: dict[str, Any] = {} if start is None else {"start": {"run": str(start)}, "model": {}}
    writer = RunWriter(path, **settings)
    write_record(
        writer.request().path / FILE, SearchedTasks(digests={"web": [task.digest for task in tasks]})
    )
    return writer.run


def test_a_digest_is_of_what_is_asked_and_right() -> None:
    same = TASKS[0].model_copy(update={"group": "other"})
    assert same.digest == TASKS[0].digest
    assert TASKS[0].model_copy(update={"answer": "1"}).digest != TASKS[0].digest
    assert len({task.digest for task in TASKS}) == len(TASKS)


def test_searches_of_earlier_runs_and_of_all_stages_count(tmp_path: Path) -> None:
    stages = tmp_path / "life" / "stages"
    earlier = searched(tmp_path / "earlier", TASKS[:1])
    first = searched(stages / "first", TASKS[1:2], earlier.path)
    second = searched(stages / "second", TASKS[2:4], first.path)
    names = [{"name": name} for name in ("first", "second", "not_begun")]
    (tmp_path / "life" / "lifecycle.yaml").write_text(yaml.safe_dump({"stages": names}))
    wanted = [{task.digest for task in TASKS[:n]} for n in (1, 2, 4)]
    places = (earlier.path, first.path, second.path)
    assert [searched_digests([place]) for place in places] == wanted
    assert searched_digests([tmp_path / "life"]) == wanted[2]
    earlier.path.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{first.path} goes on from {earlier.path}, which is no run"):
        searched_digests([second.path])


def test_what_does_not_tell_is_refused(tmp_path: Path) -> None:
    """A search of losses chose by no tasks; one of error rates must say by which."""
    writer = RunWriter(tmp_path / "run")
    search = writer.search()
    assert searched_digests([tmp_path / "run"]) == set()
    write_record(search.proposal_file, search.proposal().model_copy(update={"error_rates": ["web"]}))
    with pytest.raises(UserError, match="0001 has no tasks.json: nothing tells by which tasks it chose"):
        searched_digests([tmp_path / "run"])
    with pytest.raises(UserError, match="is not a run directory"):
        searched_digests([tmp_path])


def test_lines_keep_their_numbers() -> None:
    left = Unseen.of("file", TASKS, {TASKS[0].digest, TASKS[4].digest})
    assert (left.numbers, left.tasks, left.left_out) == ([2, 3, 4, 6], [*TASKS[1:4], TASKS[5]], 2)
    assert left.first(2).numbers == [2, 3]
    with pytest.raises(UserError, match="chose by all 6 tasks of file, so none is left"):
        Unseen.of("file", TASKS, {task.digest for task in TASKS})


def test_the_command_leaves_them_out_or_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = searched(tmp_path / "run", TASKS[1:3])
    tokenizer: PreTrainedTokenizerFast = train_tokenizer(["User: Assistant: Say 0 1 2 3 4 5"] * 3, 300)
    tokenizer.chat_template = TEMPLATE
    model: PreTrainedModel = tiny.build("llama", vocab_size=len(tokenizer), max_position_embeddings=96)
    model.save_pretrained(run.export)
    tokenizer.save_pretrained(run.export)
    file, out = tmp_path / "tasks.jsonl", tmp_path / "replies.jsonl"
    file.write_text("".join(f"{task.model_dump_json()}\n" for task in TASKS))
    command = ["score", str(run.export), "--tasks", str(file), "--max-new-tokens", "2", "--device", "cpu"]
    capsys.readouterr()  # what saving has logged
    assert main([*command, "--json", "--out", str(out), "--unseen-by", str(run.path)]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (found["rows"][0]["tasks"], found["left_out"]) == (4, {str(file): 2})
    assert "searches chose by 2 of 6 tasks, which are left out" in printed.err
    assert [json.loads(line)["number"] for line in out.read_text().splitlines()] == [1, 4, 5, 6]
    assert main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["rows"][0]["tasks"] == 6
    assert f"by 2 of these 6 tasks: --unseen-by {run.path} leaves them out" in printed.err
