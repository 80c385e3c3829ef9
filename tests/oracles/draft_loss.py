"""Loss and gradients of a draft by published trainers' own models, in float32.

in:  cases.json, {name: {trainer, batch, weights, loss, decay, smoothing}}, beside draft/ and, for each batch, NAME.npz:
     token_ids [B, T], loss_mask [B, T], lengths [B], features [B, T, L*D], embedding [V, D], head [V, D],
     teacher_hidden [B, T, D] (the target's final hidden states)
out: NAME.safetensors for each case: loss, and the gradient of every tensor of the draft by its name in the file

Blocks start wherever the trainer lets them: every candidate is taken. Each trainer gets the batch as it wants it:
SpecForge the padded rows, speculators one row with the sequences end to end, each with its padding behind it, which is
marked as nobody's. `weights` is the trainer's own name for how slots are weighted.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trainers
from safetensors.torch import save_file
from torch import nn

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        inputs = {key: torch.from_numpy(array) for key, array in np.load(folder / f"{case['batch']}.npz").items()}
        losses = {"specforge": specforge, "speculators": speculators}
        loss, draft = losses[case["trainer"]](folder / "draft", case, inputs)
        loss.backward()
        found = {key: one.grad for key, one in draft.named_parameters() if one.requires_grad}
        save_file({"loss": loss.detach(), **found}, folder / f"{name}.safetensors")


def specforge(draft: Path, case: dict[str, Any], inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, nn.Module]:
    """`dflash` or a `dpace` variant, over padded rows."""
    model = trainers.specforge(
        draft,
        inputs["embedding"],
        inputs["head"],
        attention="eager",
        num_anchors=inputs["token_ids"].shape[1],
        loss_decay_gamma=case["decay"],
        loss_type=case["weights"],
        dpace_alpha=case["smoothing"],
    )
    loss, _, _ = model(inputs["token_ids"].long(), inputs["features"].float(), inputs["loss_mask"].float())
    return loss, model.draft_model


def speculators(draft: Path, case: dict[str, Any], inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, nn.Module]:
    """`fixed-exp-decay` or `dpace`, over one packed row; with `ce` the target says the text, else `teacher_hidden`."""
    model = trainers.speculators(draft, inputs["embedding"], inputs["head"], attention="eager")
    token_ids, loss_mask = inputs["token_ids"].long(), inputs["loss_mask"].bool()
    rows, width = token_ids.shape
    places = torch.arange(width).expand(rows, width)
    document = torch.where(places < inputs["lengths"][:, None], torch.arange(rows)[:, None], -1)
    states = inputs["teacher_hidden"].reshape(rows * width, -1)
    if case["loss"] == "ce":  # which reads the target's most likely tokens
        states = trainers.verifier_states(token_ids.flatten(), loss_mask.flatten(), inputs["head"])
    options, _ = model.get_trainer_kwargs(
        loss_fn=case["loss"],
        loss_implementation="eager",
        dflash_decay_gamma=case["decay"],
        max_anchors=rows * width,
        per_position_loss_weight=case["weights"],
        dpace_alpha=case["smoothing"],
    )
    _, loss, _ = model(
        hidden_states=inputs["features"].float().reshape(1, rows * width, -1),
        input_ids=token_ids.reshape(1, -1),
        loss_mask=loss_mask.reshape(1, -1),
        verifier_last_hidden_states=states[None],
        document_ids=document.reshape(1, -1),
        position_ids=places.reshape(1, -1),
        **options,
    )
    return loss, model


if __name__ == "__main__":
    main()
