import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.generation import Sampling, generate, prefill, prefill_prompts, sample, stream
from tests.mamba_jax import golden
from tests.mamba_jax.reading import likeliest_next, read

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model():
    """Random parameters of some size: what leaks into the state of such a model changes its next token."""
    return golden.load_model("mamba1_tiny")[1]


PROMPTS = [[1, 2, 3], [4], list(range(5, 30))]


@pytest.mark.parametrize("name", ["mamba1_tiny", "mamba1_options", "mamba2_tiny", "mamba2_options"])
def test_greedy_tokens_equal_those_of_transformers(name):
    expected, model = golden.load_model(name)
    new = generate(model, expected.input_ids.tolist(), max_new_tokens=16, sampling=GREEDY)
    np.testing.assert_array_equal(new, expected.continuation)


def test_decoded_logits_equal_those_of_the_whole_sequence(model):
    sequence = jax.random.randint(jax.random.key(0), (2, 40), 0, 40)
    whole, _ = read(model, sequence)
    logits, state = prefill(model, sequence[:, :9], jnp.ones((2, 9), jnp.int32))
    step = jax.jit(model.step)
    for t in range(9, 40):
        np.testing.assert_allclose(logits, whole[:, t - 1], atol=1e-4)
        logits, state = step(sequence[:, t], state)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, top_k=12, top_p=0.9)])
def test_a_prompt_is_continued_as_if_it_were_alone(model, sampling):
    together = generate(model, PROMPTS, max_new_tokens=12, sampling=sampling, seed=3)
    # Draws depend on the place in the batch: put each prompt at its place among others of other lengths.
    for i, prompt in enumerate(PROMPTS):
        others = [prompt if i == j else [j + 1] * (7 * j + 2) for j in range(len(PROMPTS))]
        assert generate(model, others, max_new_tokens=12, sampling=sampling, seed=3)[i] == together[i]


@pytest.mark.parametrize("tokens_at_a_time", [1, 3, 5, 100])
def test_a_stream_gives_the_same_tokens(model, tokens_at_a_time):
    whole = generate(model, PROMPTS, max_new_tokens=11, seed=1)
    parts = list(stream(model, PROMPTS, max_new_tokens=11, seed=1, tokens_at_a_time=tokens_at_a_time))
    assert len(parts) == -(-11 // tokens_at_a_time)
    assert [list(itertools.chain(*rows)) for rows in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("chunk_size", [8, 16, 24, 1000])
def test_prompts_read_in_chunks_are_continued_as_if_read_at_once(model, chunk_size):
    # Ending together, prompts begin within chunks, at a boundary between two, and at the very first token.
    prompts = [[i % 40 for i in range(length)] for length in (48, 40, 33, 16, 8, 1)]
    whole, whole_state = prefill_prompts(model, prompts)
    chunked, state = prefill_prompts(model, prompts, chunk_size=chunk_size)
    np.testing.assert_allclose(chunked, whole, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state, whole_state)
    expected = generate(model, prompts, max_new_tokens=9, sampling=GREEDY)
    assert generate(model, prompts, max_new_tokens=9, sampling=GREEDY, prefill_chunk=chunk_size) == expected


def test_a_prompt_may_be_an_array(model):
    arrays = [np.array(prompt, np.uint8) for prompt in PROMPTS]
    assert generate(model, arrays, max_new_tokens=5, seed=2) == generate(model, PROMPTS, max_new_tokens=5, seed=2)


def test_a_chunk_of_no_tokens_is_refused(model):
    with pytest.raises(ValueError, match="chunk_size = 0"):
        generate(model, PROMPTS, max_new_tokens=1, prefill_chunk=0)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 140])
def test_prompts_of_any_length_are_continued(model, length):
    prompt = [i % 40 for i in range(length)]
    for _ in range(3):
        expected = likeliest_next(model, prompt, room=150)
        assert generate(model, [prompt], max_new_tokens=1, sampling=GREEDY) == [[expected]]
        prompt.append(expected)


def test_the_seed_decides_the_draws(model):
    draws = [generate(model, PROMPTS, max_new_tokens=20, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_a_continuation_ends_before_its_stop_token(model):
    free = generate(model, PROMPTS, max_new_tokens=30, seed=0)
    stop = free[0][4]
    cut = generate(model, PROMPTS, max_new_tokens=30, seed=0, stop_tokens=[stop])
    assert cut == [row[: row.index(stop)] if stop in row else row for row in free]
    streamed = stream(model, PROMPTS, max_new_tokens=30, seed=0, stop_tokens=[stop], tokens_at_a_time=4)
    assert [list(itertools.chain(*rows)) for rows in zip(*streamed, strict=True)] == cut


def test_decoding_ends_when_every_prompt_has(model):
    everything = list(range(96))
    parts = list(stream(model, PROMPTS, max_new_tokens=30, stop_tokens=everything, tokens_at_a_time=2))
    assert parts == [[[], [], []]]


def test_no_new_tokens_are_none(model):
    assert generate(model, PROMPTS, max_new_tokens=0) == [[], [], []]


LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]))


def frequencies(sampling: Sampling, draws: int = 4000):
    keys = jax.random.split(jax.random.key(0), draws)
    tokens = jax.vmap(lambda key: sample(key, LOGITS, sampling))(keys)
    return np.stack([np.bincount(row, minlength=4) / draws for row in np.asarray(tokens).T])


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]),
        (Sampling(temperature=0.0), [[1, 0, 0, 0], [0, 0, 0, 1]]),
        (
            Sampling(temperature=0.5),
            [[25 / 34.5, 6.25 / 34.5, 2.25 / 34.5, 1 / 34.5], [1 / 30, 4 / 30, 9 / 30, 16 / 30]],
        ),
        (Sampling(top_k=2), [[2 / 3, 1 / 3, 0, 0], [0, 0, 3 / 7, 4 / 7]]),
        (Sampling(top_k=99), [[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]),
        (Sampling(top_p=0.6), [[2 / 3, 1 / 3, 0, 0], [0, 0, 3 / 7, 4 / 7]]),
        (Sampling(top_p=1e-6), [[1, 0, 0, 0], [0, 0, 0, 1]]),
        (Sampling(top_k=3, top_p=0.5), [[1, 0, 0, 0], [0, 0, 3 / 7, 4 / 7]]),
    ],
)
def test_tokens_are_drawn_from_the_distribution_asked_for(sampling, expected):
    np.testing.assert_allclose(frequencies(sampling), expected, atol=0.03)


def test_rows_are_drawn_independently():
    equal = jnp.zeros((2, 1000))
    tokens = sample(jax.random.key(0), equal, Sampling())
    assert tokens[0] != tokens[1]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[1], []], "prompt 1 is empty"), ([[1, 96]], "prompt 0 has the token 96.*ends at 95"), ([[-1]], "the token -1")],
)
def test_prompts_that_cannot_be_continued_are_named(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, max_new_tokens=1)


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_that_cannot_be_done_is_named(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} = "):
        Sampling(**settings)
