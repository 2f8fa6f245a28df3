// A rollout as a table of completions; a completion as coloured tokens; two of them side by side.

// ------------------------------------------------------------------------------------------------ the rollout

function rowColumns(record, found) {
  const clippedIn = (r) => cutInRow(record, found, r), mean = groupMeans(record);
  const clippedText = (r) => {
    const { low, high } = clippedIn(r);
    return low + high ? `${[low && `${low} low`, high && `${high} high`].filter(Boolean).join(", ")}` : "no";
  };
  return [
    { name: "Prompt", value: (r) => record.group[r] * 1e6 + r, show: (r) => record.group[r] },
    { name: "Update", value: (r) => record.update[r], show: (r) => record.update[r] },
    { name: "Reward", value: (r) => record.reward[r], show: (r) => number(record.reward[r]) },
    { name: "Mean of prompt", value: (r) => mean.get(record.group[r]), show: (r) => number(mean.get(record.group[r])) },
    { name: "Â", value: (r) => record.advantage[record.start[r]], show: (r) => number(record.advantage[record.start[r]]) },
    { name: "s", value: (r) => record.logS[r], show: (r) => number(Math.exp(record.logS[r]), 6) },
    { name: "Tokens", value: (r) => lengthOf(record, r), show: (r) => lengthOf(record, r) + (record.truncated[r] ? " (cut off)" : "") },
    { name: "Clipped tokens", value: (r) => clippedIn(r).low + clippedIn(r).high, show: clippedText },
    { name: "Completion", text: true, show: (r) => short(record.texts[r]) },
    { name: "", show: (r) => h("button", {
      "data-key": `open-${r}`, "aria-label": `Open ${nameOfRow(record, r)}`,
      onclick: () => { look(state.record, r); turnTo("completion"); },
    }, "Open") },
  ];
}
// Group -> the mean reward of its completions.
function groupMeans(record) {
  const sums = new Map();
  record.group.forEach((group, r) => {
    const [total, count] = sums.get(group) || [0, 0];
    sums.set(group, [total + record.reward[r], count + 1]);
  });
  return new Map(Array.from(sums, ([group, [total, count]]) => [group, total / count]));
}
const lengthOf = (record, r) => record.start[r + 1] - record.start[r];

function drawRollout() {
  const record = recordNow(), found = weighed(record, ownSettings());
  const columns = rowColumns(record, found), all = shares(record, found);
  const wanted = state.search.toLowerCase();
  const rows = Array.from(record.row, (_, r) => r).filter((r) => {
    const cut = cutInRow(record, found, r), isCut = cut.low + cut.high > 0;
    return (state.group === "any" || String(record.group[r]) === state.group)
      && (state.clipped === "any" || isCut === (state.clipped === "yes"))
      && (!wanted || `${record.promptOf.get(record.group[r]).text}\n${record.texts[r]}`.toLowerCase().includes(wanted));
  });
  const ordered = sorted(rows, columns, state.order), limit = state.all ? ordered.length : 200;
  const groups = [["any", "all"], ...record.prompts.map((prompt) => [prompt.group, `${prompt.group}: ${short(prompt.text, 40)}`])];
  return [
    h("p", {}, `Rollout ${record.rollout}: ${record.row.length} completions of ${record.prompts.length} prompts, ${all.tokens} `
      + `tokens that count, ${record.updates.rows.length} updates. By the run's own objective ${percent(all.low + all.high, all.tokens)} of the `
      + `tokens and ${percent(all.sequences, all.rows)} of the completions are clipped.`),
    h("div", { class: "controls" },
      labelled("Prompt", choice("group", groups, state.group, (value) => { state.group = value; render(); })),
      labelled("Clipped", choice("clipped", [["any", "either"], ["yes", "yes"], ["no", "no"]], state.clipped, (value) => { state.clipped = value; render(); })),
      labelled("Text has", h("input", { type: "search", "data-key": "search", value: state.search, onchange: (event) => { state.search = event.target.value; render(); } }))),
    table(`${rows.length} of ${record.row.length} completions`, columns, ordered.slice(0, limit), {
      order: state.order, key: "rows", current: (r) => r === state.row, sort: (order) => { state.order = order; render(); },
    }),
    ordered.length > limit && h("p", {}, h("button", { "data-key": "all", onclick: () => { state.all = true; render(); } }, `Show all ${ordered.length}`)),
    h("p", { class: "faint" }, "s is the length-normalised ratio of a completion when its update began; Â its advantage."),
  ];
}

// ------------------------------------------------------------------------------------------------ colours of tokens

// name -> [title, (record) -> values of its tokens, has two signs]
const QUANTITIES = {
  logW: ["log w: now against old policy", (record) => record.logW, true],
  contribution: ["contribution to log s", (record) => record.logW.map((x, t) => (record.mask[t] ? x / record.counted[record.rowOf[t]] : 0)), true],
  shift: ["change of log π by all updates", (record) => record.shift, true],
  weight: ["gradient weight", (record) => weighed(record, settingsNow()).weight, true],
  entropy: ["entropy", (record) => record.entropy, false],
  layers: ["layers whose experts changed", (record) => record.layersChanged, false],
  margin: ["smallest router margin", (record) => record.margin, false],
  sampler: ["old against sampler", (record) => record.sampler_logp && record.old_logp.map((x, t) => x - record.sampler_logp[t]), true],
};
const quantitiesOf = (record) => Object.entries(QUANTITIES).filter(([, [, values]]) => values(record));

function scaleLine(top, two, note) {
  return h("div", { class: "scale" }, h("span", {}, two ? `−${number(top)}` : "0"), h("i", { class: two ? "two" : "one", "aria-hidden": "true" }),
    h("span", {}, number(top)), note && h("span", {}, note));
}

// The tokens of a row as buttons. One of them can be reached by Tab, the arrows go on from there.
function tokenStrip(record, row, { values, top, found, chosen, choose, mark = -1, label }) {
  const strip = h("div", { class: "tokens", role: "group", "aria-label": label });
  const first = record.start[row], buttons = [];
  for (let t = first; t < record.start[row + 1]; t++) {
    const text = piece(record, t), cut = found && (found.low[t] || found.high[t]);
    const button = h("button", {
      class: [cut && "cut", !record.mask[t] && "out", t - first === mark && "differs"].filter(Boolean).join(" "),
      tabindex: t - first === chosen ? "0" : "-1", "aria-pressed": choose && String(t - first === chosen),
      "aria-label": `${t - first}: ${text}${values ? `, ${number(values[t])}` : ""}${cut ? ", clipped" : ""}${t - first === mark ? ", first difference" : ""}`,
    }, text);
    if (values) button.style.backgroundColor = shade(top ? values[t] / top : 0);
    buttons.push(button);
    strip.append(button);
    if (text.endsWith("↵")) strip.append(h("span", { class: "break" }));
  }
  const turn = (k) => {
    buttons.forEach((button, i) => {
      button.tabIndex = i === k ? 0 : -1;
      if (choose) button.setAttribute("aria-pressed", String(i === k));
    });
    if (choose) choose(k);
  };
  buttons.forEach((button, k) => {
    button.addEventListener("focus", () => turn(k));
    button.addEventListener("click", () => turn(k));
    button.addEventListener("pointerenter", () => choose && choose(k));
  });
  strip.addEventListener("keydown", (event) => {
    const at = buttons.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (to !== undefined && buttons[to]) { event.preventDefault(); buttons[to].focus(); }
  });
  return strip;
}

function tokenCard(record, row, k) {
  const t = record.start[row] + k, own = weighed(record, ownSettings()), now = weighed(record, settingsNow());
  const cut = own.low[t] ? "below the range" : own.high[t] ? "above the range" : "no";
  const changed = [];
  for (let l = 0; l < record.layers; l++) if (experts(record, t, l)) changed.push(`${l} (${experts(record, t, l)} of ${record.experts_per_token})`);
  return [
    h("h3", {}, piece(record, t)),
    facts([
      ["token", `${k + 1} of ${lengthOf(record, row)}, id ${record.token[t]}`],
      ["log π sampler", record.sampler_logp && number(record.sampler_logp[t], 4)],
      ["log π old", number(record.old_logp[t], 4)],
      [`log π at update ${record.update[row]}`, number(record.logp[t], 4)],
      ["log π after all", number(record.after_logp[t], 4)],
      ["log π reference", record.ref_logp && number(record.ref_logp[t], 4)],
      ["log w", number(record.logW[t])],
      ["w", number(Math.exp(record.logW[t]), 4)],
      ["part of log s", record.mask[t] ? number(record.logW[t] / record.counted[row]) : "not counted"],
      ["Â", number(record.advantage[t])],
      ["clipped in the run", cut],
      [`weight by ${TITLES[state.objective]}`, number(now.weight[t])],
      ["entropy", `${number(record.entropy[t])} nats`],
      ["experts changed in layers", record.layers ? changed.join(", ") || "none" : undefined],
      ["smallest margin", record.margin && number(record.margin[t])],
    ]),
  ];
}

// ------------------------------------------------------------------------------------------------ the completion

function drawCompletion() {
  const record = recordNow(), row = state.row, found = weighed(record, ownSettings());
  if (!quantitiesOf(record).some(([name]) => name === state.quantity)) state.quantity = "logW";
  const [title, valuesOf, two] = QUANTITIES[state.quantity], values = valuesOf(record), top = extent(values);
  const card = h("div", { class: "card", id: "card", "aria-live": "polite" }, tokenCard(record, row, state.token));
  const choose = (k) => { state.token = k; card.replaceChildren(...tokenCard(record, row, k)); };
  const { low, high } = cutInRow(record, found, row);
  return [
    h("div", { class: "controls" }, rowChooser(),
      labelled("Colour", choice("quantity", quantitiesOf(record).map(([name, [text]]) => [name, text]), state.quantity, (value) => { state.quantity = value; render(); }))),
    h("div", { class: "columns" },
      h("div", {},
        h("h2", {}, "Prompt"), h("div", { class: "text" }, seen(record.promptOf.get(record.group[row]).text)),
        h("h2", {}, "Completion, token by token"),
        h("p", { class: "faint" }, `Reward ${number(record.reward[row])}, Â ${number(record.advantage[record.start[row]])}, `
          + `s ${number(Math.exp(record.logS[row]), 6)}, ${lengthOf(record, row)} tokens, ${low + high} clipped (struck through). Colour: ${title}.`),
        tokenStrip(record, row, { values, top, found, chosen: state.token, choose, label: `Tokens of ${nameOfRow(record, row)}, coloured by ${title}` }),
        scaleLine(top, two),
        h("h2", {}, "Completion as text"), h("div", { class: "text" }, seen(record.texts[row]) || "(empty)")),
      card),
  ];
}

// ------------------------------------------------------------------------------------------------ two side by side

function drawCompare() {
  const sides = [{ run: state.run, record: state.record }, state.other];
  const [a, b] = sides.map(({ run, record }) => page.runs[run].records[record]);
  const set = (change) => { Object.assign(state.other, change); state.prompt = ""; render(); };
  const controls = h("div", { class: "controls" },
    h("span", {}, `${runNow().name}, rollout ${a.rollout}, beside`),
    page.runs.length > 1 && labelled("Run", choice("other-run", runChoices(), state.other.run, (value) => set({ run: Number(value), record: Math.max(page.runs[value].records.length - 1, 0) }))),
    b && labelled("Recorded", choice("other-record", recordChoices(state.other.run), state.other.record, (value) => set({ record: Number(value) }))));
  if (!b) return [controls, h("p", {}, `${page.runs[state.other.run].name} has no record of tokens.`)];
  const keys = new Map(b.prompts.map((prompt) => [prompt.key, prompt]));
  const shared = a.prompts.filter((prompt) => keys.has(prompt.key));
  if (!shared.length) {
    return [controls, h("p", {}, "These two have no prompt in common. Arms of one comparison see the same prompts at the same rollout; "
      + "one run sees a prompt again once all have been seen.")];
  }
  if (!shared.some((prompt) => prompt.key === state.prompt)) state.prompt = shared[0].key;
  const prompt = shared.find((each) => each.key === state.prompt);
  const rows = [[a, prompt.group], [b, keys.get(prompt.key).group]].map(([record, group]) =>
    Array.from(record.row, (_, r) => r).filter((r) => record.group[r] === group));
  const count = Math.min(rows[0].length, rows[1].length);
  state.completion = Math.min(state.completion, count - 1);
  const pairs = Array.from({ length: count }, (_, g) => ({ g, a: rows[0][g], b: rows[1][g], first: firstDifference(a, rows[0][g], b, rows[1][g]) }));
  const pair = pairs[state.completion];
  const side = (record, run, row) => h("section", {}, h("h2", {}, `${page.runs[run].name}, rollout ${record.rollout}`),
    h("p", { class: "faint" }, `Reward ${number(record.reward[row])}, ${lengthOf(record, row)} tokens, s ${number(Math.exp(record.logS[row]), 6)}`),
    tokenStrip(record, row, { values: record.logW, top: extent(record.logW), chosen: Math.max(pair.first, 0), mark: pair.first,
      label: `Tokens of completion ${pair.g} in ${page.runs[run].name}, coloured by log w` }));
  return [
    controls,
    h("div", { class: "controls" },
      labelled("Prompt", choice("prompt", shared.map((each) => [each.key, `${each.group}: ${short(each.text, 50)}`]), state.prompt, (value) => { state.prompt = value; render(); })),
      labelled("Completion", choice("completion", pairs.map(({ g }) => [g, g]), state.completion, (value) => { state.completion = Number(value); render(); }))),
    h("div", { class: "text" }, seen(prompt.text)),
    h("p", {}, pair.first < 0 ? "The two completions are the same." : `They differ from token ${pair.first + 1} on, which is framed.`),
    h("div", { class: "pair" }, side(a, state.run, pair.a), side(b, state.other.run, pair.b)),
    h("h2", {}, "All completions of this prompt"),
    table("Where each pair begins to differ", [
      { name: "Completion", show: ({ g }) => g }, { name: "Reward, left", show: (p) => number(a.reward[p.a]) },
      { name: "Reward, right", show: (p) => number(b.reward[p.b]) },
      { name: "First differing token", show: (p) => (p.first < 0 ? "none" : p.first + 1) },
    ], pairs, { current: ({ g }) => g === state.completion }),
  ];
}

// The first place at which two completions differ; the end of the shorter counts. −1: nowhere.
function firstDifference(a, rowA, b, rowB) {
  const lengths = [lengthOf(a, rowA), lengthOf(b, rowB)];
  for (let k = 0; k < Math.max(...lengths); k++) {
    if (k >= lengths[0] || k >= lengths[1] || a.token[a.start[rowA] + k] !== b.token[b.start[rowB] + k]) return k;
  }
  return -1;
}
