// The objective switch, experts by layer and token, and scatters.

const TITLES = { grpo: "GRPO", gspo: "GSPO", gspo_token: "GSPO-token", cispo: "CISPO", sapo: "SAPO", gmpo: "GMPO" };
const FROM = { epsilon: 1e-5, epsilon_high: 1e-5, temperature_pos: 0.1, temperature_neg: 0.1 };
const TO = 10;
const DIALS = {
  epsilon: "ε, below", epsilon_high: "ε, above", temperature_pos: "τ where Â > 0", temperature_neg: "τ where Â ≤ 0",
};
const dialsOf = (settings) => (settings.surrogate === "sapo" ? ["temperature_pos", "temperature_neg"] : ["epsilon", "epsilon_high"]);

// ------------------------------------------------------------------------------------------------ the switch

function drawObjectives() {
  const record = recordNow(), result = h("div", {});
  const update = () => result.replaceChildren(...objectiveResult(record));
  const dials = dialsOf(settingsNow()).map((name) => dial(name, update));
  const reset = h("button", { "data-key": "reset", onclick: () => { state.settings[state.objective] = { ...page.objectives[state.objective] }; render(); } }, "The paper's");
  update();
  return [
    h("p", {}, "What another objective would have clipped of these tokens, at a range of your choice, and how much each token would "
      + "have weighed in the gradient. The log-probs are those that were recorded; nothing is trained anew."),
    h("div", { class: "controls" }, rowChooser()),
    h("div", { class: "controls" },
      labelled("Objective", choice("objective", Object.entries(TITLES), state.objective, (value) => { state.objective = value; render(); })), dials, reset),
    result,
  ];
}

// A slider in powers of ten, and the number beside it.
function dial(name, update) {
  const settings = settingsNow(), low = Math.log10(FROM[name]), high = Math.log10(TO);
  const value = h("output", {}, number(settings[name]));
  const slider = h("input", {
    type: "range", min: low, max: high, step: 0.01, "data-key": name, "aria-label": DIALS[name],
    "aria-valuetext": number(settings[name]),
    oninput: (event) => {
      state.settings[state.objective] = { ...settingsNow(), [name]: Number((10 ** Number(event.target.value)).toPrecision(3)) };
      value.textContent = number(settingsNow()[name]);
      slider.setAttribute("aria-valuetext", value.textContent);
      update();
    },
  });
  slider.value = Math.log10(settings[name]);
  return labelled(DIALS[name], h("span", {}, slider, " ", value));
}

function objectiveResult(record) {
  const found = weighed(record, settingsNow()), row = state.row, top = extent(found.weight);
  const { low, high } = cutInRow(record, found, row);
  const lines = Object.keys(TITLES).map((name) => ({ name, ...shares(record, weighed(record, settingsNow(name))), settings: settingsNow(name) }));
  return [
    h("h2", {}, `${TITLES[state.objective]} on ${nameOfRow(record, row)}`),
    h("p", { class: "faint" }, `${low} tokens clipped below, ${high} above (struck through). Colour: weight in the gradient, for this completion's update.`),
    tokenStrip(record, row, { values: found.weight, top, found, chosen: 0, label: `Tokens of ${nameOfRow(record, row)}, coloured by gradient weight` }),
    scaleLine(top, true),
    h("h2", {}, `All of rollout ${record.rollout}`),
    table("Each objective at its own setting", [
      { name: "Objective", text: true, show: (line) => TITLES[line.name] },
      { name: "Setting", text: true, show: (line) => dialsOf(line.settings).map((dialName) => number(line.settings[dialName])).join(" / ") },
      { name: "Tokens clipped", show: (line) => percent(line.low + line.high, line.tokens) },
      { name: "below", show: (line) => percent(line.low, line.tokens) },
      { name: "above", show: (line) => percent(line.high, line.tokens) },
      { name: "Completions clipped", show: (line) => percent(line.sequences, line.rows) },
      { name: "Σ |weight|", show: (line) => number(line.weight) },
    ], lines, { current: (line) => line.name === state.objective }),
    h("p", { class: "faint" }, "Weight: derivative of minus the loss by a token's log-prob, averaged as the objective averages over the minibatch of its "
      + "update. CISPO counts every capped weight as clipped, SAPO none. A completion is clipped where one of its tokens is. "
      + "Penalties, an entropy bonus and corrections for the sampler are left out."),
  ];
}

// ------------------------------------------------------------------------------------------------ layers

function drawLayers() {
  const record = recordNow(), row = state.row;
  if (!record.layers) return [h("p", {}, "A dense model has no experts to change.")];
  const L = record.layers, first = record.start[row], length = lengthOf(record, row), X = record.experts_per_token;
  const cells = [], perLayer = new Array(L).fill(0);
  for (let l = 0; l < L; l++) {
    for (let k = 0; k < length; k++) {
      const count = experts(record, first + k, l);
      if (!count) continue;
      perLayer[l]++;
      cells.push(s("rect", { class: "cell", x: k, y: l, width: 1, height: 1, "fill-opacity": 0.25 + 0.75 * (count / X) },
        s("title", {}, `token ${k + 1} ${piece(record, first + k)}, layer ${l}: ${count} of ${X} experts changed`)));
    }
  }
  const whole = layerTotals(record);
  const figure = s("svg", {
    viewBox: `0 0 ${length} ${L}`, preserveAspectRatio: "none", role: "img",
    "aria-label": `${cells.length} of ${L * length} places have another choice of experts; the table below says in which layers`,
  }, s("rect", { class: "none", width: length, height: L }), cells);
  figure.style.height = `${Math.min(Math.max(L * 18, 72), 480)}px`;
  return [
    h("div", { class: "controls" }, rowChooser()),
    h("p", {}, "Layers from top to bottom, tokens from left to right. A place is coloured where its router, when this completion's update "
      + "began, chose other experts than the old policy; the more of them, the stronger."),
    h("figure", {}, figure, h("figcaption", {}, h("span", {}, `${nameOfRow(record, row)}: ${length} tokens, ${L} layers`))),
    h("h2", {}, "By layer"),
    table("Tokens whose experts changed", [
      { name: "Layer", show: (l) => l }, { name: "This completion", show: (l) => `${perLayer[l]} of ${length}` },
      { name: "All of the rollout", show: (l) => percent(whole[l], record.token.length) },
    ], Array.from({ length: L }, (_, l) => l)),
  ];
}

function layerTotals(record) {
  const totals = new Array(record.layers).fill(0);
  for (let t = 0; t < record.token.length; t++) {
    for (let l = 0; l < record.layers; l++) totals[l] += experts(record, t, l) > 0;
  }
  return totals;
}

// ------------------------------------------------------------------------------------------------ scatters

const MOST = 2500; // points in a figure

function drawScatter() {
  const record = recordNow(), tokens = [];
  for (let t = 0; t < record.token.length; t++) if (record.mask[t]) tokens.push(t);
  const step = Math.max(1, Math.ceil(tokens.length / MOST)), some = tokens.filter((_, i) => i % step === 0);
  const rows = Array.from(record.row, (_, r) => r).filter((r) => record.counted[r]);
  const found = weighed(record, ownSettings());
  const isCut = (r) => { const { low, high } = cutInRow(record, found, r); return low + high > 0; };
  const parts = [];
  if (record.layers) {
    // Points of one number lie side by side, by a place of their own that is always the same.
    const spread = (t) => record.layersChanged[t] + (((t * 0.618) % 1) - 0.5) * 0.6;
    parts.push(scatter("log w against layers whose experts changed", some.map((t) => [spread(t), record.logW[t], record.layersChanged[t] > 0]), "layers changed"));
  }
  parts.push(scatter("s against length", rows.map((r) => [record.counted[r], Math.exp(record.logS[r]), isCut(r)]), "tokens"));
  return [
    h("p", {}, `${some.length} of ${tokens.length} tokens${step > 1 ? ` (one in ${step})` : ""} and ${rows.length} completions of rollout ${record.rollout}. `
      + "Orange: a token whose experts changed; a completion of which the run's objective clips a token."),
    h("div", { class: "figures" }, parts),
    record.layers ? [h("h2", {}, "log w by the number of layers that changed"), byChanged(record, tokens)] : [],
  ];
}

function scatter(title, points, name) {
  const { x, y, parts } = axes(points.map((p) => p[0]), points.map((p) => p[1]), name);
  const dots = points.map(([u, v, more]) => s("circle", { class: more ? "dot more" : "dot", cx: x(u).toFixed(1), cy: y(v).toFixed(1), r: 2 }));
  return h("figure", {}, h("figcaption", {}, title), drawing(`${title}: ${points.length} points`, parts, dots));
}

function byChanged(record, tokens) {
  const sums = new Map();
  for (const t of tokens) {
    const k = record.layersChanged[t], found = sums.get(k) || { k, n: 0, size: 0, square: 0 };
    found.n++;
    found.size += Math.abs(record.logW[t]);
    found.square += record.logW[t] ** 2;
    sums.set(k, found);
  }
  const lines = [...sums.values()].sort((a, b) => a.k - b.k), total = lines.reduce((sum, line) => sum + line.square, 0);
  return table("Tokens that count", [
    { name: "Layers changed", show: (line) => line.k }, { name: "Tokens", show: (line) => line.n },
    { name: "Mean |log w|", show: (line) => number(line.size / line.n) },
    { name: "Root mean square", show: (line) => number(Math.sqrt(line.square / line.n)) },
    { name: "Share of Σ (log w)²", show: (line) => percent(line.square, total) },
  ], lines);
}
