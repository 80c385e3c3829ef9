"""Trains a draft with speculators' own Trainer on this CPU: the peer of `stage=train_peer`.

    speculators_train.py IN OUT

Formats in pipeline/train/peer.py. What its Trainer takes for granted and a CPU lacks is given to it: a device, and
something to wait for. Of its attentions the fastest is used; its fused losses need a GPU, so the eager ones are.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import trainers
from safetensors.torch import save_file
from speculators.train import trainer as their_trainer
from speculators.train.data import CollateFn
from torch.utils.data import DataLoader, Dataset

# what its trainer offers beside flex attention, whose mask is compiled, which on a CPU ends in an error of g++
ATTENTIONS = ("sdpa", "eager")
TRIED_STEPS = 3  # with each of them, the first not counted

torch.accelerator.synchronize = lambda *_: None
their_trainer.get_local_rank = lambda: "cpu"


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(request["threads"])
    data = Sequences(np.load(request["data"]), request["order"])
    attention = request["attention"] or fastest(request, data)
    model, seconds, losses = train(request, data, attention, len(request["order"]))
    if request["draft_out"] is not None:
        trained = {name: one.detach().contiguous() for name, one in model.named_parameters() if one.requires_grad}
        save_file(trained, request["draft_out"], metadata={"format": "pt"})
    Path(sys.argv[2]).write_text(json.dumps({"step_seconds": seconds, "losses": losses, "attention": attention}))


class Sequences(Dataset):
    """The sequences as speculators' own dataset gives them, in memory."""

    def __init__(self, arrays: np.lib.npyio.NpzFile, order: list[list[int]]) -> None:
        self.token_ids = torch.from_numpy(arrays["token_ids"]).long()
        self.features = torch.from_numpy(arrays["features"]).view(torch.bfloat16)
        self.embedding, self.head = torch.from_numpy(arrays["embedding"]), torch.from_numpy(arrays["head"])
        self.generated, self.offsets = torch.from_numpy(arrays["generated"]), arrays["offsets"].tolist()
        self.order = order
        self.row_tokens = max(sum(self.offsets[one + 1] - self.offsets[one] for one in batch) for batch in order)
        self.states = trainers.verifier_states(self.token_ids, self.generated, self.head)

    def span(self, index: int) -> slice:
        return slice(self.offsets[index], self.offsets[index + 1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        length = self.offsets[index + 1] - self.offsets[index]
        return {
            "hidden_states": self.features[self.span(index)],
            "input_ids": self.token_ids[self.span(index)],
            "verifier_last_hidden_states": self.states[self.span(index)],
            "loss_mask": self.generated[self.span(index)],
            "lengths": torch.tensor([length]),
            "position_ids": torch.arange(length),
        }


def fastest(request: dict, data: Sequences) -> str:
    """The attention with the shortest step."""
    found = {name: min(train(request, data, name, TRIED_STEPS)[1][1:]) for name in ATTENTIONS}
    return min(found, key=found.get)


def train(
    request: dict, data: Sequences, attention: str, num_steps: int
) -> tuple[torch.nn.Module, list[float], list[float]]:
    """The model after so many steps, seconds of each step, and losses."""
    torch.manual_seed(request["seed"])
    directory, recipe = Path(request["draft"]), request["recipe"]
    model = trainers.speculators(directory, data.embedding, data.head, attention)
    loader = DataLoader(
        data,
        batch_sampler=data.order[:num_steps],
        collate_fn=CollateFn(
            data.row_tokens, data.head.shape[1], num_target_layers=len(model.target_layer_ids), dtype=torch.float32
        ),
    )
    call, _ = model.get_trainer_kwargs(
        loss_fn="ce",
        loss_implementation="eager",
        max_anchors=request["num_anchors"],
        per_position_loss_weight=recipe["weights"],
        dflash_decay_gamma=recipe["decay"],
        dpace_alpha=recipe["smoothing"],
    )
    config = their_trainer.TrainerConfig(
        num_epochs=1,
        max_steps=num_steps,
        save_path=str(directory.parent / "unsaved"),
        train_call_kwargs=call,
        hidden_states_dtype=torch.float32,
        log_freq=num_steps + 1,
        **recipe["trainer"],
    )
    losses, stamps = [], []
    model.register_forward_hook(lambda _module, _inputs, outputs: losses.append(outputs[1].detach()))
    trainer = their_trainer.Trainer(model, config, loader)
    started = time.perf_counter()
    trainer.train_epoch(0, step_callback=lambda: stamps.append(time.perf_counter()))
    return model, np.diff([started, *stamps]).tolist(), [float(loss) for loss in losses]


if __name__ == "__main__":
    main()
