"""FedHomoLLM where whole parties are hidden: clipped updates, and noise on their sum, by the server or by the parties.

The order is: train -> update -> clip -> to the grid -> noise of the party -> mask | sum | open -> noise of the server.
What would tell of a party beside its update, losses and counts, is not sent.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from fedllm.aggregate.total import GRID_BITS
from fedllm.errors import ConfigError, PayloadError
from fedllm.privacy.accountant import Mechanism, epsilon_of
from fedllm.privacy.budget import Budget
from fedllm.privacy.differential import DifferentialPrivacySettings
from fedllm.privacy.discrete import LEAST_DEVIATION, TAIL, discrete_gaussian, sensitivity
from fedllm.privacy.noise import NoiseStream
from fedllm.privacy.party_level import BIT_SHARE, FIRST_NORM, clipped, next_norm, noise_left, norm_of, with_noise
from fedllm.privacy.secure_sum import least_of
from fedllm.privacy.settings import PrivacySettings
from fedllm.privacy.terms import Terms, run_mechanism
from fedllm.scenarios.base import Row, Total
from fedllm.scenarios.fedhomollm_messages import prefixed, select
from fedllm.scenarios.fedhomollm_private import inputs_digest
from fedllm.scenarios.fedhomollm_rows import rows_of
from fedllm.scenarios.fedhomollm_settings import Settings
from fedllm.wire.codecs import Codec
from fedllm.wire.payload import Manifest, Tensors

WITHIN = "within"


def run_of(settings: Settings, asked: DifferentialPrivacySettings) -> Mechanism:
    """Return the noisy sums of a whole run: one a round, with every party that takes part.

    Args:
        settings: The scenario's.
        asked: The job's `privacy.differential_privacy`.

    Raises:
        ConfigError: `BAD_VALUE`, no noise is enough.
    """
    return run_mechanism(asked, num_units=1, expected_units=1, steps=settings.num_rounds, party="server")


def first_clip(asked: DifferentialPrivacySettings) -> float:
    """Return the clip norm of the first round.

    Args:
        asked: The job's `privacy.differential_privacy`.
    """
    return FIRST_NORM if asked.adaptive_clip else float(asked.clip_norm or 0.0)


def terms_of(settings: Settings, asked: DifferentialPrivacySettings, data: str) -> Terms:
    """Return what a round is charged as.

    Args:
        settings: The scenario's.
        asked: The job's `privacy.differential_privacy`.
        data: Digest of what is hidden.
    """
    _, delta, accountant = asked.limits
    return Terms("party", data, replace(run_of(settings, asked), steps=1), delta, accountant, asked.epsilon)


class Spread:
    """A party's share of the noise, in whole numbers, before a secure sum.

    Args:
        settings: The scenario's.
        privacy: The job's `privacy` section.
        parties: How many parties the job has.
        size: How many values an update has.
    """

    def __init__(self, settings: Settings, privacy: PrivacySettings, *, parties: int, size: int) -> None:
        self.codec = Codec(settings.codec)
        asked, threshold = privacy.differential_privacy, privacy.secure_aggregation.threshold
        cohort, step = settings.cohort_size(parties), self.codec.step
        # Enough noise even if no more parties stay than must, and some of them take theirs away.
        stay = least_of(cohort, threshold=threshold, fewest=settings.min_parties)
        self.least = stay - (asked.colluders or 0)
        clip = float(asked.clip_norm or 0.0)
        moved = sensitivity(clip, step=step, size=size)
        self.deviation = run_of(settings, asked).noise_multiplier * moved / math.sqrt(self.least) / step
        self.needed_limit = clip + TAIL * self.deviation * step
        self._limit = settings.codec.limit or 0.0

    def check(self, party: str) -> None:
        """Raise where the grid is too coarse for the noise, or too small.

        Args:
            party: The party.

        Raises:
            PayloadError: `SUM_OVERFLOW`.
        """
        where = f"party {party}"
        if self.deviation < LEAST_DEVIATION:
            what = f"the noise is {self.deviation:.2g} steps of the grid, and {LEAST_DEVIATION:g} are the least"
            raise PayloadError("SUM_OVERFLOW", what, where=where, fix="raise `federation.codec.bits`, or lower `limit`")
        if self._limit < self.needed_limit:
            what = f"with its noise an update reaches {self.needed_limit:.3g}, and the grid ends at {self._limit:g}"
            least = 2.0 ** math.ceil(math.log2(self.needed_limit))
            raise PayloadError("SUM_OVERFLOW", what, where=where, fix=f"set `federation.codec.limit: {least:g}`")

    def added(self, coded: Tensors, noise: NoiseStream) -> Tensors:
        """Return counts on the grid with noise.

        Args:
            coded: The party's update, coded.
            noise: The party's secret numbers.
        """
        return {name: self._noisy(name, tensor, noise) for name, tensor in sorted(coded.items())}

    def _noisy(self, name: str, tensor: torch.Tensor, noise: NoiseStream) -> torch.Tensor:
        draws = noise.integers(tensor.numel(), "share", name)
        found = tensor.to(torch.int64) + torch.from_numpy(discrete_gaussian(draws, self.deviation))
        info = torch.iinfo(tensor.dtype)
        # Beyond nine standard deviations; so seldom that the noise is as it is counted.
        return found.clamp(info.min + 1, info.max).to(tensor.dtype)


class PartyUnit:
    """A party's side.

    Args:
        settings: The scenario's.
        privacy: The job's `privacy` section.
        party: The party.
        parties: How many the job has.
        manifest: What is tuned.
        budget: The party's, where it adds noise itself.
    """

    def __init__(
        self,
        settings: Settings,
        privacy: PrivacySettings,
        party: str,
        *,
        parties: int,
        manifest: Manifest,
        budget: Budget | None,
    ) -> None:
        self._settings, self._asked, self._party, self._budget = settings, privacy.differential_privacy, party, budget
        size = sum(math.prod(spec.shape) for spec in manifest.values())
        is_own = self._asked.placement == "distributed"
        self._spread = Spread(settings, privacy, parties=parties, size=size) if is_own else None
        if self._spread:
            self._spread.check(party)

    def clipped(self, update: Tensors, clip_norm: float | None) -> tuple[Tensors, dict[str, float]]:
        """Return the clipped update, and what is told beside it.

        Args:
            update: The party's.
            clip_norm: That of the round.

        Raises:
            PayloadError: `PAYLOAD_REFUSED`: the server asks for another clip norm than the job.
        """
        clip = first_clip(self._asked) if clip_norm is None or not self._asked.adaptive_clip else clip_norm
        if not 0 < clip < math.inf:
            raise PayloadError("PAYLOAD_REFUSED", f"a clip norm of {clip}", where="server")
        within = {WITHIN: float(norm_of(update) <= clip)} if self._asked.adaptive_clip else {}
        return clipped(update, clip), within

    def noised(self, coded: Tensors, number: int) -> Tensors:
        """Return what travels: with the party's share of the noise, where it adds any, after that was paid for.

        Args:
            coded: The clipped update, coded. Another one has other noise.
            number: The round.
        """
        if self._spread is None or self._budget is None:
            return coded
        # The data are all that the party has; its update is hidden whatever they are.
        terms = terms_of(self._settings, self._asked, inputs_digest([{}]))
        return self._spread.added(coded, self._budget.open_round(number, inputs_digest([coded]), terms))


class ServerNoise:
    """The server's side: noise on the mean, where the server is trusted with the sum, and the clip norm that follows.

    Args:
        settings: The scenario's.
        asked: The job's `privacy.differential_privacy`.
        budget: The server's, with the key of its noise; None where the parties add the noise.
    """

    def __init__(self, settings: Settings, asked: DifferentialPrivacySettings, budget: Budget | None) -> None:
        self._settings, self._asked, self._budget = settings, asked, budget
        self._step = Codec(settings.codec).step if settings.codec.name == "Grid" else 2.0**-GRID_BITS

    def check(self, parties: int) -> None:
        """Raise where the clip norm cannot be adapted with so little noise on so few parties' bits.

        Args:
            parties: How many the job has.

        Raises:
            ConfigError: `BAD_VALUE`.
        """
        if not self._asked.adaptive_clip:
            return
        noise, least = run_of(self._settings, self._asked).noise_multiplier, self._settings.min_parties
        try:
            noise_left(noise, least)
        except ValueError:
            what = (
                f"`adaptive_clip` with noise {noise:.2f} needs {math.ceil(noise / BIT_SHARE / 2) + 1} parties a round"
            )
            fix = f"set `adaptive_clip: false`, or `federation.min_parties` higher than {least} of {parties}"
            raise ConfigError("BAD_VALUE", what, where="privacy.differential_privacy", fix=fix) from None

    def added(self, total: Total, number: int, clip_norm: float) -> tuple[Total, float]:
        """Return the sum with noise, and the clip norm of the next round.

        Args:
            total: The sum of clipped updates, equally weighted.
            number: The round.
            clip_norm: That of the round.
        """
        update, parties = select("update", total.means), len(total.parties)
        if self._asked.placement == "distributed" or self._budget is None:
            return total, clip_norm
        terms = terms_of(self._settings, self._asked, inputs_digest([{}]))
        bits = {"bits": torch.tensor([total.counts.get(WITHIN, 0.0), float(parties)])}
        noise = self._budget.open_round(number, inputs_digest([update, bits]), terms)
        multiplier, clip = terms.round.noise_multiplier, clip_norm
        if self._asked.adaptive_clip:
            multiplier = noise_left(multiplier, parties)
            within = total.counts.get(WITHIN, 0.0) + float(noise.normals(1, "bits")[0]) * BIT_SHARE * parties
            clip = next_norm(clip_norm, within, parties)
        # What is summed is rounded, which may make an update longer than it was clipped to.
        size = sum(tensor.numel() for tensor in update.values())
        moved = sensitivity(clip_norm, step=self._step, size=size)
        noisy = with_noise(update, multiplier * moved / parties, noise)
        return replace(total, means={**total.means, **prefixed("update", noisy)}), clip

    def rows(self, number: int, clip_norm: float) -> list[Row]:
        """Return what has been spent by now, and the clip norm of the round.

        Args:
            number: The round.
            clip_norm: That of the round.
        """
        _, delta, accountant = self._asked.limits
        done = replace(run_of(self._settings, self._asked), steps=number)
        spent = epsilon_of([done], delta=delta, accountant=accountant)
        return rows_of(number, None, None, {"epsilon_spent": spent, "clip_norm": clip_norm})
