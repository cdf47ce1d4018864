"""`train`: from paths and a configuration to a trained experiment directory."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch

from speechtx.config.schema import FbankConfig, TrainConfig
from speechtx.experiment.experiment import Experiment
from speechtx.training import distributed, prepare, profiling
from speechtx.training.monitor import Monitor
from speechtx.training.trainer import Trainer


def train(
    config: TrainConfig, data: prepare.TrainingData, exp: Path, *, ngpu: int = 0, share_batches: bool = False, profile: int = 0
) -> None:
    """Trains, or continues to train, one experiment.

    Args:
        config: the resolved configuration.
        data: data directories and tokenizer.
        exp: the experiment directory, made if it is not there.
        ngpu: 0 for the CPU; of several processes every one calls this function.
        share_batches: several processes split each batch, so that steps are the same as of one; see `distributed`.
        profile: takes so many steps to see where their time goes, and saves nothing but profile.md and profile.json.

    Raises:
        SpeechtxError: see `prepare` and `Trainer.run`.
    """
    world = distributed.start(ngpu, share_batches=share_batches)
    try:
        fbank = prepare.check_features_agree(data)
        with prepare.only_one_training(exp) if world.is_main else nullcontext():
            _train(config, data, exp, fbank, world, profile)
    finally:
        distributed.stop(world)


def _train(
    config: TrainConfig, data: prepare.TrainingData, exp: Path, fbank: FbankConfig, world: distributed.World, profile: int
) -> None:
    if world.is_main:
        prepare.lay_out_experiment(exp, config, fbank, data)
    world.barrier()
    train_corpus, dev_corpus, notes = prepare.build_corpora(exp, data, config)
    torch.manual_seed(config.seed)
    model = Experiment.open(exp).new_model()
    num_parameters = sum(p.numel() for p in model.parameters())
    device = prepare.device_name(world.device)
    monitor = Monitor(exp=exp, epochs=config.training.epochs, enabled=world.is_main)
    try:
        for note in notes:
            monitor.say(note)
        processes = f", {world.size} processes" if world.size > 1 else ""
        monitor.say(f"model: {num_parameters:,} parameters on {device}{processes}")
        if world.is_main and not profile:
            prepare.describe_run(exp, device=device, num_parameters=num_parameters, seed=config.seed, processes=world.size)
        if profile:  # modules can be timed only where they run one by one, and once
            plain = config.training.model_copy(update={"compile": False, "gradient_checkpointing": False})
            config = config.model_copy(update={"training": plain})
        trainer = Trainer(config=config, model=model, train=train_corpus, dev=dev_corpus, exp=exp, world=world, monitor=monitor)
        if profile:
            monitor.say(f"profile of {profile} steps:\n\n{profiling.profile(trainer, profile).markdown()}")
            return
        trainer.run()
        if world.is_main:
            prepare.finish_run(exp, trainer.seconds)
    finally:
        monitor.close()
