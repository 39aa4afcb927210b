"""What the papers say to each question, as PAPERS.md has it; none of it is measured here."""

CLAIMS = {
    "collapse": "Entropy collapses early in training without an entropy control (Cui et al. 2025, arXiv 2505.22617, "
    "Qwen2.5, 2400 steps).",
    "law": "R = -a exp(H) + b; the first 36 steps (15 %) predict the next 200 with an RMSE of 0.9 % on math and 1.2 % "
    "on code, and the final step within 0.5 % and 1.9 % (arXiv 2505.22617).",
    "spending": "73 % of the entropy and 76 % of the gain are spent in the first 200 of 2400 steps, 94 % and 93 % in "
    "the first 800 (arXiv 2505.22617).",
    "methods": "Each method's own is in the last table; they are of math sets with models of 7B to 32B.",
    "stopped": "Of stopping early none as such; with large k the base model passes models after RL (Yue et al. 2025, "
    "arXiv 2504.13837).",
    "mechanics": "Rewarded likely and punished unlikely tokens lower entropy, the other two classes raise it (arXiv "
    "2510.10150, 2602.03392); the covariance of log-prob and advantage is positive (arXiv 2505.22617).",
    "estimators": "STEER's estimate correlates with the measured change with about 0.4 (arXiv 2510.10150, Table 1, "
    "as quoted); S - E_S is exact to first order where states share no parameters (arXiv 2602.03392).",
    "lengths": "The token budget is meant to steady gradients and throughput; a comparison in numbers was not found "
    "by us (Ring-lite, arXiv 2506.14731).",
    "knobs": "Not found by us as a table; an entropy bonus of 0.005 was stable and one of 0.01 exploded (arXiv "
    "2505.22617).",
    "pareto": "None as such.",
    "recommendation": "In the rows, and in PAPERS.md.",
}
