"""A run: a training that its specification describes, kept in files."""

from pathlib import Path
from typing import Any

from benchmarks.common.steps import weights_to_judge
from benchmarks.paper.data import Dataset
from benchmarks.paper.training import run_files
from benchmarks.paper.training.run_spec import RunSpec
from benchmarks.paper.training.training import Training, Watch


class Run(Training):
    """A training that can be stopped and resumed to the bit.

    Args:
        spec: what to run.
        data: the task's examples, as :meth:`Task.data` gives them.
        out: where results and checkpoints go; None: nowhere.
    """

    def __init__(self, spec: RunSpec, data: Dataset, out: Path | None = None) -> None:
        self.spec, self.out, self.hyper = spec, out, spec.full_hyper
        data = data.held_out() if spec.held_out else data
        self.label = data.label
        super().__init__(
            spec.definition,
            data,
            lambda setting: spec.method.make(setting, self.hyper),
            seed=spec.seed,
            epochs=spec.epochs,
            steps=spec.steps,
            device=spec.device,
            dtype=spec.dtype,
        )
        self.follow(spec.method.schedule, self.hyper)

    def resume(self) -> bool:
        """Take up the checkpoint in ``out``, if there is one. Raises ValueError where it is another run's."""
        state = run_files.load_checkpoint(self.spec, self.out) if self.out else None
        if state is not None:
            self.load_state_dict(state)
        return state is not None

    def save(self) -> None:
        """A checkpoint."""
        if self.out is not None:
            run_files.save_checkpoint(self.spec, self.out, self.state_dict())

    def go(
        self, watch: Watch | None = None, *, limit_seconds: float | None = None, limit_steps: int | None = None
    ) -> dict[str, Any]:
        """Train as :meth:`Training.train` does; write what came out; return it. A checkpoint stays at a limit."""
        self.train(watch, limit_seconds=limit_seconds, limit_steps=limit_steps)
        payload = self._payload()
        if self.out is not None:
            run_files.save_result(self.spec, self.out, payload)
            if self.status == "unfinished":
                self.save()
            else:
                run_files.discard_checkpoint(self.spec, self.out)
        return payload

    def _payload(self) -> dict[str, Any]:
        task, spec = self.task, self.spec
        scores: dict[str, float] = {}
        if task.score is not None and self.status == "finished":
            with weights_to_judge(self.optimizer):
                scores = task.score(self.model, self.data)
        return {
            "status": self.status,
            "reason": self.reason,
            "task": task.name,
            "title": task.title,
            "place": task.place,
            "data": self.label,
            "stand_in": task.source.stand_in,
            "model": task.model_name,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "optimizer": spec.optimizer,
            "label": spec.method.label,
            "hyper": self.hyper,
            "hyper_from": spec.hyper_from,
            "seed": spec.seed,
            "precision": spec.precision,
            "batch_size": task.batch_size,
            "epochs": self.total / len(self.batches),
            "steps": self.step,
            "total_steps": self.total,
            "seconds": self.seconds,
            "loss_name": task.loss.name,
            "judged_on": len(self.judged),
            "metric_name": task.loss.metric,
            "higher_is_better": task.loss.higher_is_better,
            "scores": scores,
            "identity": spec.identity(),
            "curve": self.curve,
        }
