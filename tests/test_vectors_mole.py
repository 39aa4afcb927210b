"""Worked cases of routing and of the routers' losses, in float64."""

from typing import Any

import torch
from test_vectors import EXACT, cases, tensor

from rlvr.mole.router import hybrid_route, load_balance, top_k_route, tsallis_entropy, z_loss
from rlvr.mole.routers import DynMole, TopK, auxiliary_loss

close = torch.testing.assert_close


@cases("dynmole")
def test_dynmole(case: dict[str, Any]) -> None:
    probs, p, expected = tensor(case["inputs"]["probs"]), case["params"], case["expected"]
    match case["method"]:
        case "tsallis":
            close(tsallis_entropy(probs, p["q"]), tensor(expected["entropy"]), **EXACT)
            close(tsallis_entropy(probs, p["q"], normalized=True), tensor(expected["normalised"]), **EXACT)
        case "dynmole_route" | "dynmole_route_release" as method:
            settings = {name: p[name] for name in ("q", "threshold", "top_p", "min_k")}
            rule = "release" if method.endswith("release") else "reach"
            routing = hybrid_route(probs, **settings, rule=rule, normalized=p["normalised"])
            close(tsallis_entropy(probs, p["q"], p["normalised"]), tensor(expected["entropy"]), **EXACT)
            assert routing.selected.tolist() == expected["selected"]
            close(routing.weight, tensor(expected["weight"]), **EXACT)
        case "dynmole_aux":
            for normalized, name in ((False, "raw"), (True, "normalised")):
                coefs = {"entropy_coef": p["beta_entropy"], "balance_coef": p["alpha_lb"]}
                router = TopK(k=p["top_k"], q=p["q"], normalized=normalized, **coefs)
                loss, terms = auxiliary_loss(router, probs.log())
                close(loss, tensor(expected[f"aux_{name}"]), **EXACT)
                close(terms["balance"], tensor(expected["lb"]), **EXACT)
                close(terms["entropy"], tensor(expected["entropy_mean" + "_normalised" * normalized]), **EXACT)
        case "dynmole_aux_release":
            settings = {name: p[name] for name in ("q", "threshold", "top_p", "min_k")}
            router = DynMole(entropy_coef=p["beta_entropy"], balance_coef=p["alpha_lb"], **settings)
            loss, terms = auxiliary_loss(router, probs.log())
            close(loss, tensor(expected["aux"]), **EXACT)
            close(terms["balance"], tensor(expected["lb"]), **EXACT)
            close(terms["entropy"], tensor(expected["entropy_mean_normalised"]), **EXACT)
        case method:
            raise AssertionError(method)


@cases("moe")
def test_moe(case: dict[str, Any]) -> None:
    expected = case["expected"]
    if case["method"] == "router_z_loss":
        close(z_loss(tensor(case["inputs"]["logits"])), tensor(expected["loss"]), **EXACT)
        return
    k = case["params"]["k"]
    routing = top_k_route(tensor(case["inputs"]["probs"]), k)
    close(routing.weight.sort(descending=True).values[:, :k], tensor(expected["weight_sorted"]), **EXACT)


def test_a_balanced_top_k_router_has_the_balance_k() -> None:
    probs = torch.eye(4, dtype=torch.float64) * 0.4 + torch.eye(4, dtype=torch.float64).roll(1, 1) * 0.6
    selected = top_k_route(probs, 2).selected.double()
    close(load_balance(selected, probs), tensor(2.0), **EXACT)
