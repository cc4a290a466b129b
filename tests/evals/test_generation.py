"""A task's ``generation_kwargs``: lm-eval's rules, and what is not honoured is refused by name."""

import pytest

from pdn.errors import ConfigError
from pdn.evals.generation import read_generation
from pdn.inference.sampling import Sampling

SAMPLES = {"do_sample": True, "temperature": 0.8}


@pytest.mark.parametrize(
    ("options", "how", "tokens"),
    [
        ({}, Sampling(0.0), 256),
        ({"temperature": 0.5}, Sampling(0.5), 256),
        ({"temperature": 0.5, "do_sample": False}, Sampling(0.0), 256),
        (SAMPLES | {"top_k": 0, "top_p": 0.9}, Sampling(0.8, None, 0.9), 256),
        (SAMPLES | {"top_k": 7, "num_beams": 1}, Sampling(0.8, 7), 256),
        ({"max_tokens": 5}, Sampling(0.0), 5),
        ({"max_completion_tokens": 5, "max_new_tokens": 6, "max_gen_toks": 7}, Sampling(0.0), 7),
    ],
)
def test_options_mean_what_they_mean_in_lm_eval(options, how, tokens):
    found = read_generation("t", {"until": ["a", ""]} | options)
    assert (found.how, found.max_new_tokens, found.stops) == (how, tokens, ("a",))
    assert read_generation("t", {"until": "a"} | options) == found


@pytest.mark.parametrize(
    ("options", "repeats", "said"),
    [
        ({"do_sample": True}, 1, "do_sample: true without a temperature"),
        ({"do_sample": True, "temperature": 0}, 4, "do_sample: true without a temperature"),
        ({}, 4, "repeats: 4 at temperature 0, where every answer is the same"),
        ({"num_beams": 10}, 1, "num_beams: 10 is not supported"),
        ({"min_p": 0.1}, 1, "min_p: 0.1 is not supported"),
        ({"max_gen_toks": 0}, 1, "max_gen_toks: 0"),
        ({"until": 5}, 1, "until: 5"),
        ({"temperature": -1}, 1, "temperature=-1.0"),
        ({"temperature": float("nan")}, 1, "temperature=nan"),
        ({"temperature": "hot"}, 1, "could not convert"),
        (SAMPLES | {"top_p": "0.5"}, 1, "'<"),
    ],
)
def test_an_option_that_is_not_honoured_is_refused_by_name(options, repeats, said):
    with pytest.raises(ConfigError) as refused:
        read_generation("codes", options, repeats)
    message = str(refused.value)
    assert "codes: generation_kwargs: " in message and said in message and "expected" in message
