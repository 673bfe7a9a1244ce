"""Features as JSON, in the layout that circuit-tracer's and Neuronpedia's pages read: one file a feature."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from bilinear_tc.upload.contexts import Context
from bilinear_tc.upload.reading import LayerReading
from bilinear_tc.upload.vocabulary import Vocabulary

BINS = 50
QUANTILES = np.linspace(0, 1, 101)
SIDES = {1: "Top activations", -1: "Bottom activations"}


def features_of(reading: LayerReading, vocabulary: Vocabulary, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each feature's file name and content.

    Beyond the layout, `name` says what the feature is. Its values have both signs; its frequency is the share of tokens
    where it is above 0.

    Args:
        reading: of a layer.
        vocabulary: the base's.
        name: the set's.
    """
    spread = reading.spread
    for number, feature in enumerate(reading.features):
        values = spread.sample(number).double().numpy()
        top, bottom = vocabulary.moved(feature.raises)
        yield (
            f"{feature.index}.json",
            {
                "transcoder_id": f"{name}/layer_{reading.layer}",
                "index": feature.index,
                "name": feature.name,
                "examples_quantiles": [
                    {
                        "quantile_name": title,
                        "examples": [example(context, vocabulary) for context in reading.contexts.of(number, sign)],
                    }
                    for sign, title in SIDES.items()
                ],
                "top_logits": top,
                "bottom_logits": bottom,
                "act_min": spread.low[number].item(),
                "act_max": spread.high[number].item(),
                "quantile_values": np.quantile(values, QUANTILES).tolist(),
                "histogram": np.histogram(values, BINS)[0].tolist(),
                "activation_frequency": spread.positive[number].item() / spread.seen,
            },
        )


def example(context: Context, vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "tokens_acts_list": context.values,
        "train_token_ind": context.peak,
        "is_repeated_datapoint": False,
        "tokens": [vocabulary.text(token) for token in context.tokens],
    }
