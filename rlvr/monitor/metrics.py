"""The one table that explains every metric: unit and meaning. A metric that is not in it cannot be recorded.

Names are `area/quantity`. The area of a control's metrics is the control's name. Rows are alphabetical within an area.
Unless a row says otherwise, a value is reduced over all processes and covers one optimizer step; times are those of
the main process.
"""

from dataclasses import dataclass

from rlvr.errors import unknown


@dataclass(frozen=True, slots=True)
class Metric:
    """unit: `nats`, `fraction` (0 to 1), `tokens`, ...   meaning: one line.   normal: what a healthy run shows.

    touches: the metric is the share of trained tokens whose gradient a control or the clip changed.
    """

    unit: str
    meaning: str
    normal: str | None = None
    touches: bool = False


METRICS: dict[str, Metric] = {
    # policy: the objective and how far the update moved
    "policy/drift": Metric(
        "nats", "mean |log ratio| over the tokens that pay for it", "0 on a rollout's first update"
    ),
    "policy/kl_old": Metric("nats", "KL from the policy at the start of the update, k3 estimate", "below 0.05"),
    "policy/logp": Metric("nats", "mean log-prob of the sampled tokens; minus this estimates the entropy"),
    "policy/loss": Metric("1", "the loss that was minimized, all terms included", "near 0; its level says little"),
    "policy/ratio": Metric("ratio", "mean importance ratio, current policy over start of the update", "0.95 to 1.05"),
    "policy/reference_kl": Metric("nats", "KL from the reference policy, k3 estimate, token mean"),
    "policy/router_aux_loss": Metric("1", "load-balancing loss of a mixture-of-experts model, before its coefficient"),
    "policy/tokens": Metric("tokens", "tokens trained on: the denominator of the token means"),
    "policy/weight": Metric("1", "mean weight on the surrogate, from controls and the engine correction", "near 1"),
    # entropy
    "entropy/mean": Metric("nats", "exact entropy of softmax(z / temperature), mean over the trained tokens"),
    # clip: the surrogate's own clipping
    "clip/high": Metric("fraction", "trained tokens clipped at the upper bound (A > 0)", "below 0.05", touches=True),
    "clip/low": Metric("fraction", "trained tokens clipped at the lower bound (A < 0)", "below 0.05", touches=True),
    # controls, one area each
    "clip_cov/candidates": Metric("fraction", "trained tokens inside the covariance band and not clipped"),
    "clip_cov/cov": Metric("nats", "covariance of log-prob and advantage, mean over the trained tokens"),
    "clip_cov/masked": Metric("fraction", "trained tokens whose gradient Clip-Cov removed", touches=True),
    "kl_cov/cov": Metric("nats", "covariance of log-prob and advantage, mean over the trained tokens"),
    "kl_cov/selected": Metric("fraction", "trained tokens that carry the KL-Cov penalty", touches=True),
    # reward and rollout: over the completions of a rollout, repeated for each step that trains on it
    "reward/mean": Metric("reward", "mean reward of the scored completions"),
    "reward/std": Metric("reward", "standard deviation of the reward over the scored completions"),
    "reward/unscored": Metric("fraction", "completions left out because no reward could be computed", "0"),
    "reward/verifier_errors": Metric("fraction", "completions whose verifier raised or died", "0"),
    "reward/verifier_timeouts": Metric("fraction", "completions whose verifier ran out of time", "below 0.01"),
    "reward/zero_variance_groups": Metric("fraction", "groups with one and the same reward: no gradient", "below 0.7"),
    "rollout/completion_length": Metric("tokens", "mean length of a completion"),
    "rollout/completion_length_max": Metric("tokens", "length of the longest completion"),
    "rollout/prompt_length": Metric("tokens", "mean length of a prompt"),
    "rollout/tokens": Metric("tokens", "completion tokens generated for the rollout"),
    "rollout/truncated": Metric("fraction", "completions cut off at the length limit", "below 0.1"),
    # mismatch: sampler (engine) against trainer, same weights, over the rollout's tokens
    "mismatch/abs_logp_max": Metric("nats", "largest |trainer log-prob - engine log-prob|", "below 1 in bf16"),
    "mismatch/abs_logp_mean": Metric(
        "nats", "mean |trainer log-prob - engine log-prob|", "about 0.04 in bf16, 1e-5 in fp32"
    ),
    "mismatch/kl": Metric("nats", "KL from the sampler to the trainer, k3 estimate", "below 0.01"),
    "mismatch/ratio_max": Metric("ratio", "largest trainer over engine probability of a token", "below 10"),
    "mismatch/ratio_mean": Metric("ratio", "mean trainer over engine probability of a token", "0.98 to 1.02"),
    "mismatch/ratio_min": Metric("ratio", "smallest trainer over engine probability of a token", "above 0.1"),
    # time: wall-clock inside one optimizer step; a step that reuses a rollout has no rollout phases
    "time/old_logps": Metric("s", "recomputing log-probs at the start of the update"),
    "time/rollout": Metric("s", "generating completions"),
    "time/rollout_tokens_per_s": Metric("tokens/s", "rollout/tokens over time/rollout"),
    "time/step": Metric("s", "the whole optimizer step, every phase included"),
    "time/sync_weights": Metric("s", "sending the weights to the engine"),
    "time/update": Metric("s", "forward, backward and optimizer"),
    "time/update_tokens_per_s": Metric("tokens/s", "policy/tokens over time/update"),
    "time/verify": Metric("s", "waiting for the verifiers"),
    # optim
    "optim/grad_norm": Metric("1", "norm of the gradient before clipping", "steady; spikes precede collapse"),
    "optim/learning_rate": Metric("1", "learning rate of the step"),
    # heldout: evaluations, recorded in evals.jsonl
    "heldout/reward": Metric("reward", "mean reward on held-out prompts"),
    "heldout/reward_ci95": Metric("reward", "half width of the 95 % interval of heldout/reward"),
}

TOUCHED = tuple(name for name, entry in METRICS.items() if entry.touches)


def metric(name: str) -> Metric:
    """The entry of `name`. Raises: ConfigError, with the nearest names, if the table does not explain it."""
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]


def format_metrics() -> str:
    """The table as plain text, one area after the other."""
    lines: list[str] = []
    area = ""
    for name, entry in METRICS.items():
        if name.partition("/")[0] != area:
            area = name.partition("/")[0]
            lines += ["", area] if lines else [area]
        normal = f"  [{entry.normal}]" if entry.normal else ""
        lines.append(f"  {name:<30} {entry.unit:<9} {entry.meaning}{normal}")
    return "\n".join(lines)
