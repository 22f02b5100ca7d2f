"""What is missing is run, and nothing else; what fails leaves nothing behind that counts as done."""

from __future__ import annotations

import json
import os
import shlex
import time
from io import StringIO

import pytest
from data_files import message_of
from noted_commands import STAY, command, is_running, pid_of, run, runs_of
from rich.console import Console

from dllm_memdlm.machine import devices, package_versions
from reproduce.commands import BEGUN, DONE, LOG, Command, run_missing

ADVICE = "move it away, or give another folder with --runs"


# --- done and not done ---------------------------------------------------------------------------------------------


def test_what_is_done_is_not_run_again(tmp_path):
    first, second = command(tmp_path / "a"), command(tmp_path / "b")
    assert run(tmp_path, [first])[0] == "0 commands done, 1 to run"
    assert run(tmp_path, [first], [second])[0] == "1 commands done, 1 to run"
    assert run(tmp_path, [first], [second]) == ["2 commands done, 0 to run"]
    assert (runs_of(tmp_path / "a"), runs_of(tmp_path / "b")) == (1, 1)


def test_the_record_says_what_was_run_from_what_and_where(tmp_path):
    made_from = {"data.needle_words": (20, 40), "memory.rank": 4, "model.path": None}
    before = command(tmp_path / "before")
    fields = {"made_from": made_from, "env": {"A": "1", "B": ""}, "after": (before,)}
    own = command(tmp_path / "a", "print('hello'); time.sleep(0.3)", **fields)
    assert own.record() is None and not own.is_done()
    printed = "\n".join(run(tmp_path, [before], [own]))
    record = json.loads((tmp_path / "a" / DONE).read_text())
    assert list(record) == ["id", "command", "made_from", "after", "seconds", "versions", "devices"]
    assert record["command"] == own.line and own.line.startswith("A=1 B= python -c ")
    assert record["made_from"] == {"data.needle_words": [20, 40], "memory.rank": 4, "model.path": None}
    assert record["after"] == {str(before.folder): before.record()["id"]} and record["id"] != before.record()["id"]
    assert 0.3 <= record["seconds"] < 60 and record["seconds"] == round(record["seconds"], 1)
    assert (record["versions"], record["devices"]) == (package_versions(), devices())
    assert own.record() == record and own.is_done()
    assert (tmp_path / "a" / LOG).read_text() == "hello\n"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted([DONE, LOG])
    assert f"2/2  {own.line}\n" in printed and f"2/2  {tmp_path / 'a'} took " in printed
    assert run(tmp_path, [own]) == ["1 commands done, 0 to run"], "a list in the record is the tuple it was"


def test_the_record_names_what_a_command_may_use(tmp_path):
    own = command(tmp_path / "a", env={"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "3"})
    run(tmp_path, [own])
    assert own.record()["devices"] == [f"cpu: {os.cpu_count()} cores, 3 used by each command"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"made_from": {"rank": 8, "alpha": 2}}, "made with rank=4, now 8"),
        ({"made_from": {"rank": 4}}, "made with alpha=2, now None"),
        ({"made_from": {"rank": 4, "alpha": 2, "new": "x"}}, "made with new=None, now 'x'"),
        ({"made_from": {"rank": 8, "alpha": 2}, "arguments": ["--two"]}, "made with rank=4, now 8"),
        ({"arguments": ["--two"]}, "made with --one 1, now --two"),
        ({"arguments": ["--one", "1", "--more"]}, "made with nothing, now --more"),
        ({"env": {"A": "2"}}, "made with A=1, now A=2"),
    ],
)
def test_another_commands_folder_is_refused(tmp_path, changes, message):
    fields = {"arguments": ["--one", "1"], "made_from": {"rank": 4, "alpha": 2}, "env": {"A": "1"}}

    def made(arguments: list[str], **rest) -> Command:
        return command(tmp_path / "a", "", *arguments, **rest)

    assert run(tmp_path, [made(**fields)])[0] == "0 commands done, 1 to run"
    text = message_of(run, tmp_path, [command(tmp_path / "b")], [made(**{**fields, **changes})])
    assert text == f"{tmp_path / 'a'}: {message}; {ADVICE}"
    assert runs_of(tmp_path / "a") == 1 and not (tmp_path / "b").exists(), "nothing else is begun either"


def test_the_same_words_in_another_order_are_not_called_nothing(tmp_path):
    run(tmp_path, [command(tmp_path / "a", "", "--words", "40", "80")])
    text = message_of(run, tmp_path, [command(tmp_path / "a", "", "--words", "80", "40")])
    assert text.startswith(f"{tmp_path / 'a'}: made with ") and "nothing" not in text


def test_a_result_is_of_the_results_it_was_made_from(tmp_path):
    base = command(tmp_path / "base")
    own = command(tmp_path / "own", after=(base,))
    text = f"{own.folder}: made from what {base.folder} was before; {ADVICE}"
    run(tmp_path, [base], [own])
    assert own.is_done() and command(tmp_path / "own").is_done()
    (base.folder / DONE).rename(tmp_path / "kept")
    assert message_of(run, tmp_path, [base], [own]) == text, "it is not there"
    run(tmp_path, [base])
    assert message_of(run, tmp_path, [base], [own]) == text, "it is there again, made anew"
    (tmp_path / "kept").rename(base.folder / DONE)
    assert run(tmp_path, [base], [own]) == ["2 commands done, 0 to run"]


def test_the_same_command_given_twice_is_run_once(tmp_path):
    one, again = command(tmp_path / "a"), command(tmp_path / "a")
    assert one == again and hash(one) == hash(again)
    assert run(tmp_path, [one, again, one])[0] == "0 commands done, 1 to run"
    assert runs_of(tmp_path / "a") == 1
    assert run(tmp_path, [one, again]) == ["1 commands done, 0 to run"]


def test_the_same_command_in_two_stages_is_run_once(tmp_path):
    own = command(tmp_path / "a")
    assert run(tmp_path, [own], [command(tmp_path / "b"), own])[0] == "0 commands done, 2 to run"
    assert (runs_of(tmp_path / "a"), runs_of(tmp_path / "b")) == (1, 1)


def test_the_line_can_be_typed_in_a_shell(tmp_path):
    own = Command(tmp_path, ("-c", "print('a  b', 2)", "memory.target_modules=[q_proj, k_proj]"), env={"A": "1"})
    assert shlex.split(own.line) == ["A=1", "python", *own.argv] and own.line.startswith("A=1 python -c ")


def test_variables_reach_the_command_beside_those_of_this_process(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMDLM_TEST_KEPT", "kept")
    monkeypatch.setenv("MEMDLM_TEST_SET", "before")
    show = "print([os.environ.get('MEMDLM_TEST_' + name) for name in ('KEPT', 'SET', 'EMPTY')])"
    run(tmp_path, [command(tmp_path / "a", show, env={"MEMDLM_TEST_SET": "now", "MEMDLM_TEST_EMPTY": ""})])
    assert (tmp_path / "a" / LOG).read_text() == "['kept', 'now', '']\n"


# --- how many at a time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_so_many_run_at_a_time_and_no_more(tmp_path, at_once):
    """Each waits until as many have begun, so that fewer at a time would never end."""
    code = f"""
begun = time.monotonic()
while len(list(own.parent.glob('*.runs'))) < {at_once}:
    assert time.monotonic() < begun + 60, 'alone'
    time.sleep(0.01)
time.sleep(0.3)
(own / 'span').write_text(f'{{begun}} {{time.monotonic()}}')
"""
    stage = [command(tmp_path / str(number), code) for number in range(2 * at_once)]
    run(tmp_path, stage, at_once=at_once)
    spans = [tuple(map(float, (own.folder / "span").read_text().split())) for own in stage]
    assert max(sum(begun <= moment < ended for begun, ended in spans) for moment, _ in spans) == at_once


def test_a_stage_begins_after_the_one_before_has_ended(tmp_path):
    first = [command(tmp_path / "a", "time.sleep(0.5)"), command(tmp_path / "b")]
    check = f"sys.exit(sum(path.exists() for path in map(Path, {[str(c.folder / DONE) for c in first]})) != 2)"
    run(tmp_path, first, [command(tmp_path / "c", check)], [command(tmp_path / "d")], at_once=3)
    assert all((tmp_path / name / DONE).exists() for name in "abcd")


# --- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "last"),
    [
        ("print('50 %\\r100 %\\rno space left \\n\\n'); sys.exit(3)", 3, "no space left"),
        ("raise ValueError('rank=0: [bold]expected[/bold] 1')", 1, "ValueError: rank=0: [bold]expected[/bold] 1"),
        ("sys.stdout.buffer.write(b'\\xff'); sys.exit(2)", 2, "�"),
        ("print('error: no rows'); print('Traceback: …\\n======'); sys.exit(2)", 2, "error: no rows"),
        ("print('all is lost'); print('=====\\n - - -'); sys.exit(2)", 2, "all is lost"),
        ("sys.exit(4)", 4, "it printed nothing"),
        ("os.kill(os.getpid(), 9)", -9, "it printed nothing"),
    ],
)
def test_a_failure_is_told_in_one_line(tmp_path, code, status, last):
    text = message_of(run, tmp_path, [command(tmp_path / "a", code)], [command(tmp_path / "b")])
    assert text == f"{tmp_path / 'a' / LOG}: the command ended with {status}: {last}"
    assert not (tmp_path / "a" / DONE).exists()
    assert not (tmp_path / "b").exists(), "it is of a later stage"


def test_a_failure_ends_the_others_and_what_was_done_stays(tmp_path):
    wait = f"while not Path({str(tmp_path / 'long' / 'pid')!r}).exists(): time.sleep(0.02)\nsys.exit(3)"
    stage = [command(tmp_path / "quick"), command(tmp_path / "long", STAY), command(tmp_path / "bad", wait)]
    started = time.monotonic()
    assert message_of(run, tmp_path, stage).startswith(f"{tmp_path / 'bad' / LOG}: the command ended with 3: ")
    assert time.monotonic() - started < 60 and not is_running(pid_of(tmp_path / "long"))
    assert [own.is_done() for own in stage] == [True, False, False]


def test_after_a_failure_no_other_is_begun(tmp_path):
    console, stage = Console(file=StringIO()), [command(tmp_path / "a", "sys.exit(3)"), command(tmp_path / "b")]
    message_of(run_missing, [stage], tmp_path, 1, console)
    assert "1/2  python" in console.file.getvalue() and "2/2" not in console.file.getvalue()
    assert runs_of(tmp_path / "b") == 0 and not stage[1].is_done()


@pytest.mark.parametrize("resumes", [False, True])
def test_what_was_begun_and_not_finished_is_run_again(tmp_path, resumes):
    flag = tmp_path / "flag"
    code = f"""
print(sorted(os.listdir(own)))
(own / 'checkpoint').mkdir(exist_ok=True); (own / 'checkpoint' / 'weights').touch(); (own / '{DONE}.part').touch()
sys.exit(not Path({str(flag)!r}).exists())
"""
    own = command(tmp_path / "b", code, resumes=resumes)
    stages = [[command(tmp_path / "a")], [own], [command(tmp_path / "c")]]
    assert message_of(run, tmp_path, *stages).endswith(f"ended with 1: ['{BEGUN}', '{LOG}']")
    flag.touch()
    assert run(tmp_path, *stages)[0] == "1 commands done, 2 to run"
    assert [runs_of(tmp_path / name) for name in "abc"] == [1, 2, 1]
    first = f"['{BEGUN}', '{LOG}']"
    left = f"['{BEGUN}', 'checkpoint', '{DONE}.part', '{LOG}']" if resumes else first
    assert (tmp_path / "b" / LOG).read_text() == f"{first}\n{left}\n", "the log goes on"
    assert own.is_done()


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("left", ["checkpoint/weights", "weights"])
def test_what_another_command_has_left_is_not_gone_on_from(tmp_path, resumes, left):
    code = f"(own / {left!r}).parent.mkdir(exist_ok=True); (own / {left!r}).touch(); sys.exit('--lr' not in sys.argv)"
    failed = command(tmp_path / "a", code, made_from={"lr": 1}, resumes=resumes)
    assert "ended with 1" in message_of(run, tmp_path, [failed])
    other = command(tmp_path / "a", code, "--lr", made_from={"lr": 2}, resumes=resumes)
    if resumes and "/" in left:
        assert message_of(run, tmp_path, [other]) == f"{tmp_path / 'a'}: made with lr=1, now 2; {ADVICE}"
        assert runs_of(tmp_path / "a") == 1
    else:
        assert run(tmp_path, [other])[0] == "0 commands done, 1 to run"
        assert other.is_done()


def test_the_last_line_is_of_this_attempt(tmp_path):
    own = [
        command(
            tmp_path / "a", "print('too little') if own.with_suffix('.runs').stat().st_size < 2 else 0; sys.exit(3)"
        )
    ]
    assert message_of(run, tmp_path, own).endswith("too little")
    assert message_of(run, tmp_path, own).endswith("it printed nothing")
