"""PyTorch's own elastic launcher, started with what makes restarts work."""

from collections.abc import Sequence

from torch.distributed import run as torchrun

from ckptd.trainer.standby import Standby, install

# A dead node is given up after about 2 s instead of 15, and late nodes are not waited for.
_RENDEZVOUS_CONF = {
    "is_host": "0",
    "keep_alive_interval": "1",
    "keep_alive_max_attempt": "2",
    "last_call_timeout": "1",
}
MAX_RESTARTS = 100


def complete_arguments(
    arguments: Sequence[str], job: str, rendezvous: str | None, address: str | None
) -> list[str]:
    """torchrun's arguments with the missing ones put in front; the user's own win.

    `rendezvous`: `host:port` of a `ckptd rendezvous`; None leaves rendezvous to the user.
    `address`: this node's own, as its agent knows it.
    """
    parsed = torchrun.parse_args(list(arguments))  # type: ignore[no-untyped-call] # torch's
    script_arguments = parsed.training_script_args
    own = arguments[: len(arguments) - len(script_arguments) - 1]
    given = {_flag(argument) for argument in own if argument.startswith("--")}
    added: list[str] = []
    if "max-restarts" not in given:
        added.append(f"--max-restarts={MAX_RESTARTS}")
    if "standalone" in given:
        return [*added, *arguments]
    if "rdzv-id" not in given:
        added.append(f"--rdzv-id={job}")
    if rendezvous is not None and "rdzv-endpoint" not in given:
        added += ["--rdzv-backend=c10d", f"--rdzv-endpoint={rendezvous}"]
        if "rdzv-conf" not in given:
            added.append("--rdzv-conf=" + ",".join(f"{k}={v}" for k, v in _RENDEZVOUS_CONF.items()))
    if address and "local-addr" not in given:
        added.append(f"--local-addr={address}")
    return [*added, *arguments]


def watched(arguments: Sequence[str]) -> list[str]:
    """torchrun's arguments with the script run by `ckptd.trainer.script`, which shows it first.

    A program that is no Python script, or that torchrun runs in a way of its own, stays as it is:
    it is seen once it has made its Checkpointer.
    """
    parsed = torchrun.parse_args(list(arguments))  # type: ignore[no-untyped-call] # torch's
    if parsed.no_python or parsed.run_path:
        return list(arguments)
    split = len(arguments) - len(parsed.training_script_args) - 1
    own, script = list(arguments[:split]), list(arguments[split:])
    if not parsed.module:
        return [*own, "-m", "ckptd.trainer.script", *script]
    return [*own, "ckptd.trainer.script", "--module", *script]


def use(standby: Standby, arguments: Sequence[str]) -> None:
    """Have torchrun start ranks from `standby`; `arguments` as `watched` made them.

    Where that cannot be, the standby is ended.
    """
    parsed = torchrun.parse_args(list(arguments))  # type: ignore[no-untyped-call] # torch's
    if parsed.training_script != "ckptd.trainer.script":
        standby.give_up("torchrun is to start no Python script")
    elif not install(standby):
        standby.give_up("the launcher of this version of PyTorch is not known")


def launch(arguments: Sequence[str]) -> None:
    """Hand over to torchrun; returns, or raises, as it does."""
    torchrun.main(list(arguments))


def _flag(argument: str) -> str:
    """torchrun takes --rdzv-id and --rdzv_id alike."""
    return argument[2:].partition("=")[0].replace("_", "-")
