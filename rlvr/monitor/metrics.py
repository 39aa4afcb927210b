"""The one table that explains every metric: unit and meaning. A metric that is not in it cannot be recorded.

Names are `area/quantity`. The area of a control's metrics is the control's name.
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


_ROWS: dict[str, Metric] = {
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
    "policy/router_z_loss": Metric("1", "z-loss of the expert routers, before its coefficient"),
    "policy/skipped": Metric(
        "fraction", "sequences without any gradient, not trained on; entropy counts them as of the rollout"
    ),
    "policy/tokens": Metric("tokens", "tokens of the step that no control masks, skipped sequences included"),
    "policy/weight": Metric("1", "mean weight on the surrogate, from controls and the engine correction", "near 1"),
    # router: of a mixture of LoRA experts, over all routers and the tokens, prompts included, of the step's texts that
    # were passed with gradient (policy/skipped)
    "router/aux_loss": Metric("1", "auxiliary loss of the routers, coefficients included"),
    "router/balance": Metric(
        "1", "load balance of the routers, before its coefficient", "1 per expert slot when even"
    ),
    "router/dead": Metric("fraction", "experts that get less than 1 % of an even share of their layer's tokens", "0"),
    "router/drift": Metric(
        "fraction",
        "total variation of a text's load of experts from that by the policy that made it, mean over routers",
        "0 on a rollout's first update",
    ),
    "router/entropy": Metric(
        "1", "Tsallis entropy of the routers, normalized to [0, 1] unless the run says otherwise"
    ),
    "router/experts": Metric("experts", "experts that a token is sent to, mean"),
    "router/load_max": Metric("1", "largest load of an expert, in even shares of its layer", "1 to 2"),
    "router/soft": Metric("fraction", "tokens that are sent to all experts of a layer"),
    "router/z": Metric("1", "z-loss of the routers, before its coefficient"),
    # entropy
    "entropy/mean": Metric(
        "nats",
        "exact entropy of softmax(z / temperature), mean over the trained tokens, those too that a control masks",
        "0.2 to 1.0 in published RLVR runs",
    ),
    **{
        f"entropy/share_top_{percent}pct": Metric(
            "fraction", f"share of all entropy in the {percent} % of the tokens that have most"
        )
        for percent in (50, 20, 10, 5, 1)
    },
    # covariance of log-prob and advantage over the tokens of the step: what drives entropy down
    "covariance/mean": Metric("nats", "mean of (A - mean A)(logp - mean logp)", "positive while entropy falls"),
    **{
        f"covariance/top_2_in_{n}": Metric(
            "nats", f"mean of the largest 2 in {n} covariances", f"{first} at the first step of a 7B model"
        )
        for n, first in ((10, 0.35), (100, 1.39), (1000, 3.11), (10000, 5.65))
    },
    # dynamics: entropy change of the step on the probe's tokens (probe_sequences), measured by a second pass
    "dynamics/measured": Metric("nats", "mean entropy change of the probe's tokens by the step"),
    "dynamics/predicted": Metric(
        "nats", "its first-order prediction for an SGD step: learning rate * -alpha (S - E_S)"
    ),
    **{
        f"dynamics/{what}_{sign}_{side}": Metric("nats", f"{what} change at {side} tokens (p {op} exp(-H)), A {rel} 0")
        for what in ("measured", "predicted")
        for sign, rel in (("punished", "<"), ("rewarded", ">"))
        for side, op in (("likely", ">"), ("unlikely", "<="))
    },
    **{
        f"dynamics/{name}_{what}": Metric(
            unit, f"{text} of measured on predicted change over tokens, estimator {name}"
        )
        for name in ("covariance", "discriminator", "single_logit", "steer", "steer_released")
        for what, unit, text in (
            ("correlation", "1", "correlation"),
            ("r2", "fraction", "variance explained"),
            ("slope", "1", "slope"),
        )
    },
    **{
        f"dynamics/{name}_mean": Metric("1", f"predicted change, mean over the probe's tokens, estimator {name}")
        for name in ("covariance", "discriminator", "single_logit", "steer", "steer_released")
    },
    # law: R = -a exp(H) + b, fitted to the rollouts so far
    "law/a": Metric("reward", "slope: reward gained per unit of exp(entropy) spent", "positive"),
    "law/b": Metric("reward", "intercept of R = -a exp(H) + b"),
    "law/ceiling": Metric("reward", "b - a, the predicted reward when all entropy is spent"),
    "law/ceiling_high": Metric("reward", "upper end of its 95 % interval, if the law holds that far"),
    "law/ceiling_low": Metric("reward", "lower end of its 95 % interval, if the law holds that far"),
    "law/holds": Metric("1", "1: the data do not refute the law; 0: not yet to be said; -1: it does not hold here"),
    "law/r2": Metric("fraction", "variance of the reward that the law explains"),
    "law/r2_linear": Metric("fraction", "variance of the reward that a straight line in H explains"),
    # critic and its advantages: what it knew of a rollout before it learned from it, and what it learned in the step
    "advantage/mean": Metric("reward", "mean advantage of a token, before whitening", "near 0"),
    **{
        f"advantage/p{percent:02d}": Metric("reward", f"advantage below which {percent} % of the tokens lie")
        for percent in (5, 50, 95)
    },
    "advantage/std": Metric("reward", "standard deviation of the advantage over tokens, before whitening"),
    "critic/clipped": Metric("fraction", "tokens whose value has moved too far from the rollout's to be pulled on"),
    "critic/earned": Metric("reward", "mean of the discounted rewards that followed a token"),
    "critic/explained_variance": Metric(
        "fraction", "variance of what followed that the rollout's values explain", "above 0, below 1; 0 is a constant"
    ),
    "critic/grad_norm": Metric("1", "norm of the critic's gradient before clipping"),
    "critic/kl_penalty": Metric("nats", "log pi_old - log pi_ref that rewards pay for, token mean"),
    "critic/learning_rate": Metric("1", "the critic's learning rate of the step"),
    "critic/loss": Metric("reward^2", "value loss, half a squared error, mean over the step's tokens"),
    "critic/value": Metric("reward", "mean value of the rollout's tokens", "near critic/earned"),
    # clip: the surrogate's own clipping
    "clip/dual": Metric("fraction", "trained tokens beyond the dual clip (A < 0)", "near 0", touches=True),
    "clip/high": Metric("fraction", "trained tokens clipped at the upper bound (A > 0)", "below 0.05", touches=True),
    "clip/low": Metric("fraction", "trained tokens clipped at the lower bound (A < 0)", "below 0.05", touches=True),
    # controls, one area each
    "adaptive_entropy/applied": Metric("1", "coefficient of the entropy bonus in this step, 0 above the target"),
    "adaptive_entropy/coef": Metric("1", "coefficient that the controller holds, applied only below the target"),
    "clip_b/masked": Metric("fraction", "trained tokens that Clip_B took out of the loss", touches=True),
    "clip_b/std": Metric("nats", "standard deviation of the entropy discriminator over the trained tokens"),
    "clip_cov/candidates": Metric("fraction", "trained tokens inside the covariance band and not clipped"),
    "clip_cov/cov": Metric("nats", "covariance of log-prob and advantage, mean over the trained tokens"),
    "clip_cov/masked": Metric("fraction", "trained tokens whose gradient Clip-Cov removed", touches=True),
    "clip_v/candidates": Metric("fraction", "trained tokens beyond Clip_V's threshold, before its cap"),
    "clip_v/masked": Metric("fraction", "trained tokens that Clip_V took out of the loss", touches=True),
    "clip_v/std": Metric("nats", "standard deviation of the centered entropy discriminator over the trained tokens"),
    "entropy_advantage/bonus": Metric("1", "what uncertain tokens gain in advantage, mean over the trained tokens"),
    "entropy_advantage/bounded": Metric("fraction", "trained tokens whose bonus is cut to |A| / kappa"),
    "entropy_bonus/coef": Metric("1", "coefficient of the entropy bonus"),
    "geometric_gate/masked": Metric("fraction", "trained tokens in sequences outside the band", touches=True),
    "geometric_gate/weight": Metric("1", "mean weight for the engine's mismatch, 0 where masked", "near 1"),
    "high_entropy/masked": Metric("fraction", "trained tokens left out because the policy is certain", touches=True),
    "high_entropy/threshold": Metric("nats", "entropy from which a token is trained on"),
    "icepop/masked": Metric("fraction", "trained tokens whose engine ratio leaves the band", touches=True),
    "icepop/weight": Metric("1", "mean weight for the engine's mismatch, 0 where masked", "near 1"),
    "kl_cov/cov": Metric("nats", "covariance of log-prob and advantage, mean over the trained tokens"),
    "kl_cov/selected": Metric("fraction", "trained tokens that carry the KL-Cov penalty", touches=True),
    "mis/masked": Metric("fraction", "trained tokens in sequences whose engine ratio leaves the band", touches=True),
    "mis/weight": Metric("1", "mean weight for the engine's mismatch, 0 where masked", "near 1"),
    "off_policy_mask/kl": Metric("nats", "log-prob of the engine minus the current policy's, token mean"),
    "off_policy_mask/masked": Metric("fraction", "trained tokens in bad sequences far off-policy", touches=True),
    "reference_kl/coef": Metric("1", "coefficient of the KL to the reference policy"),
    "steer/changed": Metric("fraction", "trained tokens whose weight STEER moved by more than 0.01", touches=True),
    "steer/omega": Metric("nats", "size of the estimated entropy change per unit of step, token mean"),
    "steer/omega_max": Metric("nats", "largest estimated entropy change of a token, to which weights are relative"),
    "tis/capped": Metric("fraction", "trained tokens whose engine ratio is cut to its bounds", touches=True),
    "tis/weight": Metric("1", "mean weight for the engine's mismatch", "near 1"),
    "token_budget/filled": Metric("ratio", "tokens kept over the token budget", "1; below it the batch is too small"),
    "token_budget/kept": Metric("fraction", "share of the step's tokens that fit into the token budget"),
    # thermostat: the controller that holds entropy in a band
    "entropy/outside": Metric("steps", "steps in a row beyond the entropy alarm's limits, negative below", "0"),
    "thermostat/outside": Metric("steps", "steps in a row with entropy outside the band, negative below it", "0"),
    "thermostat/position": Metric("1", "where the lever stands: 0 leaves least entropy, 1 most", "inside (0, 1)"),
    "thermostat/value": Metric("1", "the hyper-parameter that the thermostat moves"),
    # reward and rollout: over the completions of a rollout, repeated for each step that trains on it
    "reward/mean": Metric("reward", "mean reward of the scored completions"),
    **{
        f"reward/pass_at_{2**i}": Metric("fraction", f"prompts solved by at least one of {2**i} completions, unbiased")
        for i in range(13)
    },
    "reward/stage": Metric("index", "stage of the task that the step's prompts are of, counted from 0"),
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
    "time/critic": Metric("s", "the critic's passes, over the rollout and in the update"),
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
    "optim/skipped": Metric("1", "1 where the step was skipped: its loss or gradient is not finite", "0"),
    "optim/learning_rate": Metric("1", "learning rate of the step"),
    # heldout: evaluations, recorded in evals.jsonl
    **{
        f"heldout/pass_at_{2**i}": Metric("fraction", f"held-out prompts solved by one of {2**i} samples, unbiased")
        for i in range(13)
    },
    "heldout/reward": Metric("reward", "mean reward on held-out prompts"),
    "heldout/reward_ci95": Metric("reward", "half width of the 95 % interval of heldout/reward"),
}

_AREAS = list(dict.fromkeys(name.partition("/")[0] for name in _ROWS))
METRICS = {name: _ROWS[name] for name in sorted(_ROWS, key=lambda name: (_AREAS.index(name.partition("/")[0]), name))}
EFFECT = Metric("nats", "what a control adds to dynamics/predicted; recorded as <control>/effect", "positive")
TOUCHED = tuple(name for name, entry in METRICS.items() if entry.touches)


def metric(name: str) -> Metric:
    """The entry of `name`. Raises: ConfigError, with the nearest names, if the table does not explain it."""
    if name.endswith("/effect"):
        return EFFECT
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
    lines += ["", "<control>", f"  {'<control>/effect':<30} {EFFECT.unit:<9} {EFFECT.meaning}  [{EFFECT.normal}]"]
    return "\n".join(lines)
