"""Part `stack`: four layers and the head at the real shapes, by what is kept for the backward pass.

In: the engine. Out: tokens per second of two and four layers, and of 24 by their difference.
"""

import time
from dataclasses import replace

from benchmarks.gpu_parts.bench import BF16, REAL, Bench, rates
from benchmarks.gpu_parts.networks import Engine, batch, clear, random_network
from keural.train.network.attention import choose_attention


def stack(bench: Bench) -> None:
    """Four layers and the head by the new engine."""
    tokens, chosen = bench.size.tokens, choose_attention(bench.device, BF16)
    sizes = {layers: bench.size.layers(layers) for layers in (4, 2)}
    network = random_network(sizes[4].config, bench.device)
    networks = {4: network, 2: network._replace(blocks=network.blocks[:2])}
    documents = bench.size.length // 6
    cases: list[tuple[str, bool, int, int | None]] = [
        ("selective", True, tokens, None),
        ("full", True, tokens, None),
        ("none", True, tokens, None),
        ("selective", True, tokens // 2, None),
        ("selective", True, tokens, documents),
        ("none", False, tokens, None),
        ("full", False, tokens, None),
    ]
    for mode, compiled, count, document in cases if bench.cuda else cases[-2:]:
        name = f"{mode}{'_compiled' if compiled else '_eager'}_{count}{'_documents' if document else ''}"
        with bench.guarded(name, 12):
            found: dict[int, float] = {}
            for layers in (4, 2):
                bench.free()
                clear(network)
                engine = Engine(sizes[layers], networks[layers], chosen, compiled)
                step = engine.step(batch(sizes[layers], count, bench.device, document), engine.modes(mode))
                begun = time.monotonic()
                loss = float(step())
                first = time.monotonic() - begun
                found[layers] = bench.ms(step, 4)
                values = rates(sizes[layers], found[layers], count)
                bench.record(
                    name,
                    **{f"layers_{layers}": values | {"peak_gib": bench.peak(), "first_s": round(first, 1), "loss": round(loss, 4)}},
                )
            extrapolate(bench, name, found, count)
    clear(network)


def extrapolate(bench: Bench, name: str, found: dict[int, float], tokens: int) -> None:
    """What 24 layers would take, by the difference of 4 and 2."""
    layer = (found[4] - found[2]) / 2
    whole = found[4] + layer * (REAL.config.num_hidden_layers - 4)
    size = replace(bench.size, config=REAL.config)
    rest = found[2] - 2 * layer
    bench.record(name, layer_ms=round(layer, 2), rest_ms=round(rest, 2), extrapolated_24=rates(size, whole, tokens))
