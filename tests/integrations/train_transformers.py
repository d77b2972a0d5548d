"""A tiny model of GPT-2's kind, trained by transformers' Trainer."""

import os
import tempfile

import torch
from diary import end_of_step, parse_args, say
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from ckptd.errors import CkptdError
from ckptd.integrations.transformers import CkptdCallback, train


class Diary(TrainerCallback):
    def __init__(self, args):
        self.args, self.begun = args, False

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.begun:
            say(event="start", step=state.global_step)
            self.begun = True

    def on_step_end(self, args, state, control, **kwargs):
        schedule = (state.epoch, kwargs["lr_scheduler"].get_last_lr())
        end_of_step(self.args, state.global_step, kwargs["model"], [kwargs["optimizer"]], schedule)


def main():
    args = parse_args(accumulate=1, unseeded=0, bare=0)
    torch.set_num_threads(1)
    numbers = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 64, (46, 12), generator=numbers)
    data = [{"input_ids": row, "labels": row} for row in rows]
    torch.manual_seed(1)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    )
    diary = Diary(args)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=4 // args.accumulate,
                gradient_accumulation_steps=args.accumulate,
                num_train_epochs=3,
                learning_rate=1e-2,
                warmup_steps=5,
                lr_scheduler_type="cosine",
                logging_steps=1,
                eval_strategy="steps",
                eval_steps=7,
                save_strategy="no",
                accelerator_config={"use_seedable_sampler": not args.unseeded},
                use_cpu=True,
                ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
                report_to=[],
                seed=5,
            ),
            train_dataset=data[:-6],
            eval_dataset=data[-6:],
            callbacks=[diary] if args.plain else [diary, CkptdCallback(every=1)],
        )
        try:
            trainer.train() if args.plain or args.bare else train(trainer)
        except CkptdError as error:
            say(event="refused", kind=type(error).__name__, text=str(error))
            raise
    timing = ("time", "per_second", "train_loss", "total_flos")
    history = [
        {key: value for key, value in entry.items() if not key.endswith(timing)}
        for entry in trainer.state.log_history
    ]
    say(event="end", steps=trainer.state.global_step, epoch=trainer.state.epoch, history=history)


if __name__ == "__main__":
    main()
