"""HF Trainer with LLaVA's order of samples; what to train and where its files go is ``cli.py``'s."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader
from transformers import Trainer

from llava_twophase.train.dataset import CaptionDataset
from llava_twophase.train.order import EpochOrder


class ProjectorTrainer(Trainer):
    """Trains the projector; the loss is the mean of each device's batch, averaged over devices, as in LLaVA."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the data loader in LLaVA's order, one share of it for each process."""
        args = self.args
        assert isinstance(self.train_dataset, CaptionDataset)
        grouped = getattr(args, "group_by_modality_length", False)
        order = EpochOrder(
            len(self.train_dataset),
            args.seed if args.data_seed is None else args.data_seed,
            args.world_size,
            self.train_dataset.lengths() if grouped else None,
            args.train_batch_size,
            args.world_size * args.gradient_accumulation_steps,
        )
        loader = DataLoader(
            self.train_dataset,
            batch_size=args.train_batch_size,
            sampler=order,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            drop_last=args.dataloader_drop_last,
        )
        return self.accelerator.prepare(loader)
