"""What a checkpoint is not loaded into, and what is not saved: refused with item, found and fix."""

import math

import pytest

from pdn.checkpoint.format import step_directory
from pdn.checkpoint.read import load_weights
from pdn.errors import NumericError
from tests.checkpoint.small import (
    build,
    checkpointer,
    refusal,
    resign,
    saved,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_a_step_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    saved(tmp_path)
    message = refusal(lambda: checkpointer(tmp_path).restore(*build(), "step:7"))
    assert message.startswith("pdn[E-CKPT-ABSENT]") and message.endswith(
        "no checkpoint of step 7; expected one of 1, 2, 3: resume=step:3"
    )
    for wrong in ("step:", "step:-1", "step:1e3", "latest", "step:1;rm"):
        assert "expected auto, never, restart or step:N" in refusal(
            lambda wrong=wrong: checkpointer(tmp_path).restore(*build(), wrong)
        )


def test_an_uncommitted_step_is_refused(tmp_path):
    saved(tmp_path)
    (step_directory(tmp_path, 3) / "COMMITTED").unlink()
    assert "E-CKPT-UNCOMMITTED" in refusal(
        lambda: checkpointer(tmp_path).restore(*build(), "step:3")
    )
    assert "E-CKPT-UNCOMMITTED" in refusal(
        lambda: load_weights(step_directory(tmp_path, 3), build()[0])
    )
    assert checkpointer(tmp_path).restore(*build())[0] == 2


def test_a_model_of_another_shape_is_refused_with_the_first_five_differences(tmp_path):
    saved(tmp_path)
    message = refusal(lambda: checkpointer(tmp_path).restore(*build(width=18)))
    assert "E-CKPT-SHAPE" in message
    assert "blocks.0.0.bias: checkpoint float32[17], model float32[18]" in message
    assert message.count("checkpoint float32") == 5 and "and 4 more" in message


def test_another_dtype_is_refused(tmp_path):
    saved(tmp_path)
    model, optimizer = build()
    message = refusal(lambda: checkpointer(tmp_path).restore(model.double(), optimizer))
    assert "E-CKPT-DTYPE" in message and "checkpoint float32[17], model float64[17]" in message


def test_a_checkpoint_without_optimizer_state_is_refused_for_resuming_and_serves_for_weights(
    tmp_path,
):
    model, optimizer = build()
    checkpointer(tmp_path).save(5, model, optimizer, {})
    message = refusal(lambda: checkpointer(tmp_path).restore(*build()))
    assert "E-CKPT-OPTIM" in message and "init_from" in message
    assert load_weights(tmp_path, build()[0]) == (5, {})


def test_hugging_face_weights_and_missing_paths_are_named_as_such(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"")
    assert "E-CKPT-FOREIGN" in refusal(lambda: load_weights(tmp_path / "hf", build()[0]))
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for name, parts in {
        "nothing": (
            "E-CKPT-ABSENT",
            "no such directory; expected a run, or one of its checkpoints; check the path",
        ),
        "file": (
            "E-CKPT-ABSENT",
            "a file; expected a run, or one of its checkpoints; check the path",
        ),
        "run": (
            "E-CKPT-ABSENT",
            "found a run without a finished checkpoint; expected one: train it",
        ),
        "empty": (
            "E-CKPT-FOREIGN",
            "found nothing; expected manifest.json and COMMITTED",
            "check the path",
        ),
    }.items():
        message = refusal(lambda name=name: load_weights(tmp_path / name, build()[0]))
        assert all(part in message for part in (f"{tmp_path / name}: ", *parts)), message


def test_a_newer_format_is_refused_and_says_so(tmp_path):
    saved(tmp_path, (1,))
    resign(step_directory(tmp_path, 1), {"format": 3})
    message = refusal(lambda: checkpointer(tmp_path).restore(*build()))
    assert "E-CKPT-FORMAT" in message and "format 3, expected at most 2" in message


def test_values_that_json_cannot_hold_are_refused_before_anything_is_written(tmp_path):
    model, optimizer = build()
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpointer(tmp_path).save(1, model, optimizer, {"loss": math.nan})
    assert list(tmp_path.iterdir()) == []


def test_nothing_non_finite_is_saved(tmp_path):
    model, optimizer, _ = saved(tmp_path, (1,))
    optimizer.state[model.embed.weight]["exp_avg"][3, 3] = math.nan
    with pytest.raises(
        NumericError, match=r"optim\.embed\.weight\.exp_avg on rank 0 is not finite"
    ) as caught:
        checkpointer(tmp_path).save(2, model, optimizer, {})
    assert caught.value.exit_code == 70
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]
