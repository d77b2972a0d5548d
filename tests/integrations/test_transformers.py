"""transformers' Trainer, killed and started again."""

import pytest

pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SCRIPT = "train_transformers.py"


@pytest.mark.parametrize("flags", ["--accumulate 1", "--accumulate 4 --unseeded 1"])
def test_a_killed_training_goes_on_as_if_nothing_had_happened(machine, flags):
    # Ten steps an epoch; the first snapshot is of the middle of one, the second of an end.
    machine.check_story(SCRIPT, *flags.split(), die_at=[8, 21])


def test_so_do_two_ranks(machine):
    machine.check_story(SCRIPT, die_at=[4, 11], ranks=2)


def test_the_trainer_alone_does_not_start_from_nothing(machine):
    machine.run(SCRIPT, "--die-at", "8", fails=True)
    refused = machine.event(machine.run(SCRIPT, "--bare", "1", fails=True), "refused")
    assert refused["kind"] == "SnapshotElsewhere"
    assert "call ckptd.integrations.transformers.train(trainer)" in refused["text"]
    machine.run(SCRIPT)
