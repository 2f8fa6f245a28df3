"use strict";
// What an objective makes of recorded log-probs: gspo/objectives/ again, for the switch in the page. A test compares
// the two on random and on edge batches. No penalties and no corrections of the sampler: the policy's term alone.

const MAX_LOG_RATIO = 20; // ratios.py
const ratio = (logRatio) => Math.exp(Math.min(logRatio, MAX_LOG_RATIO));
// The slope of min(x, 20), of which JAX gives each side half where they meet.
const uncapped = (logRatio) => (logRatio < MAX_LOG_RATIO ? 1 : logRatio === MAX_LOG_RATIO ? 0.5 : 0);
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

// Each: (log-ratio, advantage, settings) -> {low, high: clipped there; slope: of the value to be maximised, by the
// log-ratio; direct: the same by log π where that stands in it beside the ratio}.
const SURROGATES = {
  clip(x, A, s) {
    const w = ratio(x);
    const low = w < 1 - s.epsilon && A < 0, high = w > 1 + s.epsilon_high && A > 0;
    return { low, high, slope: low || high ? 0 : w * A * uncapped(x), direct: 0 };
  },
  dual_clip(x, A, s) {
    const inner = SURROGATES.clip(x, A, s), over = ratio(x) > s.delta && A < 0;
    return over ? { ...inner, high: true, slope: 0 } : inner;
  },
  cispo(x, A, s) {
    const w = ratio(x), live = A !== 0;
    return {
      low: w < 1 - s.epsilon && live, high: w > 1 + s.epsilon_high && live,
      slope: 0, direct: clamp(w, 1 - s.epsilon, 1 + s.epsilon_high) * A,
    };
  },
  sapo(x, A, s) {
    const tau = A > 0 ? s.temperature_pos : s.temperature_neg, w = ratio(x);
    const gate = 1 / (1 + Math.exp(-tau * (w - 1)));
    return { low: false, high: false, slope: 4 * gate * (1 - gate) * w * A * uncapped(x), direct: 0 };
  },
  minirl(x, A, s) {
    const w = ratio(x);
    const low = w < 1 - s.epsilon && A < 0, high = w > 1 + s.epsilon_high && A > 0;
    return { low, high, slope: 0, direct: (low || high ? 0 : Math.min(w, s.cap)) * A };
  },
  reinforce(x, A) {
    return { low: false, high: false, slope: 0, direct: A };
  },
};

// Log-ratios of one row -> what the level makes of them: one for each token; `shared`: one for all, of which each
// token's log-prob moves so much.
const LEVELS = {
  token: (logW) => ({ logRatios: logW, shared: 0 }),
  sequence: (logW, mean) => ({ logRatios: logW.map(() => mean), shared: 1 / logW.length }),
  sequence_token: (logW, mean) => ({ logRatios: logW.map(() => mean), shared: 0 }),
  sequence_sum: (logW, mean) => ({ logRatios: logW.map(() => mean * logW.length), shared: 1 }),
};

// By what a row's sum of values is divided: [in the row, over the batch]. aggregations.py
function divisors(settings, length, counts) {
  switch (settings.loss_agg_mode) {
    case "token-mean": return [1, counts.tokens];
    case "seq-mean-token-sum": return [1, counts.rows];
    case "seq-mean-token-sum-norm": return [1, counts.rows * (settings.loss_norm_length || counts.width)];
    default: return [length, counts.rows];
  }
}

// batch: logp, old_logp, advantage, mask, one entry a token; start: where the tokens of each row begin, and the end of
// all; counts(row): {rows, tokens, width} of the batch that the row is averaged in.
// -> low, high: whether a token is clipped; weight: d(-loss) / d(log-prob) of each token.
function weigh(settings, batch) {
  const size = batch.logp.length;
  const result = { low: new Uint8Array(size), high: new Uint8Array(size), weight: new Float64Array(size) };
  for (let row = 0; row + 1 < batch.start.length; row++) {
    const tokens = [];
    for (let t = batch.start[row]; t < batch.start[row + 1]; t++) if (batch.mask[t]) tokens.push(t);
    if (tokens.length) weighRow(settings, batch, row, tokens, result);
  }
  return result;
}

function weighRow(settings, batch, row, tokens, result) {
  const logW = tokens.map((t) => batch.logp[t] - batch.old_logp[t]);
  const [inRow, overBatch] = divisors(settings, tokens.length, batch.counts(row));
  const scale = 1 / (inRow * overBatch);
  if (settings.surrogate === "gmpo") return gmpoRow(settings, batch, tokens, logW, scale, result);
  const mean = logW.reduce((a, b) => a + b, 0) / logW.length;
  const { logRatios, shared } = LEVELS[settings.importance_sampling_level](logW, mean);
  const found = tokens.map((t, i) => SURROGATES[settings.surrogate](logRatios[i], batch.advantage[t], settings));
  const together = shared * found.reduce((sum, one) => sum + one.slope, 0);
  tokens.forEach((t, i) => {
    result.low[t] = found[i].low;
    result.high[t] = found[i].high;
    result.weight[t] = scale * ((shared ? together : found[i].slope) + found[i].direct);
  });
}

// Tokens are clipped before their mean is taken.
function gmpoRow(settings, batch, tokens, logW, scale, result) {
  const A = tokens.map((t) => batch.advantage[t]);
  const low = logW.map((x, i) => x < -settings.epsilon && A[i] < 0);
  const high = logW.map((x, i) => x > settings.epsilon_high && A[i] > 0);
  const held = logW.map((x, i) => (low[i] || high[i] ? clamp(x, -settings.epsilon, settings.epsilon_high) : x));
  const mean = held.reduce((a, b) => a + b, 0) / held.length;
  const together = (ratio(mean) * uncapped(mean) * A.reduce((a, b) => a + b, 0)) / tokens.length;
  tokens.forEach((t, i) => {
    result.low[t] = low[i];
    result.high[t] = high[i];
    result.weight[t] = low[i] || high[i] ? 0 : scale * together;
  });
}
