"""The file of scalars survives interruptions."""

import pytest

from diffpose_jax.io import scalars


def test_written_lines_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with scalars.ScalarWriter(path, last_step=0) as writer:
        writer.write(10, loss=0.1 + 0.2, learning_rate=1e-4)
        # Each line is there as soon as it is written: a killed process loses none.
        assert len(scalars.read_scalars(path)) == 1
        writer.write(20, loss=2.0, learning_rate=1e-4)
    assert scalars.read_scalars(path) == [
        {"step": 10, "loss": 0.1 + 0.2, "learning_rate": 1e-4},
        {"step": 20, "loss": 2.0, "learning_rate": 1e-4},
    ]


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2, "loss": 1.5}'])
def test_a_last_line_without_an_end_is_left_out(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n' + torn)
    assert scalars.read_scalars(path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize("torn", ["", '{"step": 30, "lo', '{"step": 20, "loss": 1'])
def test_resuming_removes_later_lines(tmp_path, torn):
    path, unbroken = tmp_path / "broken.jsonl", tmp_path / "unbroken.jsonl"
    with scalars.ScalarWriter(unbroken, last_step=0) as writer:
        for step in (10, 20, 30):
            writer.write(step, loss=1 / step)
    lines = unbroken.read_text().splitlines(keepends=True)
    # Killed after step 20 or within its line or that of 30; the last checkpoint is of step 10.
    path.write_text("".join(lines[:2] if torn.startswith('{"step": 30') else lines[:1]) + torn)
    with scalars.ScalarWriter(path, last_step=10) as writer:
        assert [line["step"] for line in scalars.read_scalars(path)] == [10]
        for step in (20, 30):
            writer.write(step, loss=1 / step)
    assert path.read_bytes() == unbroken.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {path.name, unbroken.name}
