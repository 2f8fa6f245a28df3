// What is looked at: state, and the controls that change it.

const state = {
  tab: "overview", run: 0, record: Infinity, row: 0, token: 0, quantity: "logW", objective: "gspo", settings: {},
  order: { column: 0, down: false }, search: "", clipped: "any", group: "any", all: false, more: "",
  other: null, prompt: "", completion: 0,
};
let page = null; // what `unpack` returned

const runNow = () => page.runs[state.run];
const recordNow = () => runNow().records[state.record];
// The objective that the run was trained by; the settings of the page's switch.
const ownSettings = () => recordNow().objective;
const settingsNow = (name = state.objective) => state.settings[name];

function begin(content) {
  page = content;
  state.settings = Object.fromEntries(Object.entries(content.objectives).map(([name, s]) => [name, { ...s, ...state.settings[name] }]));
  state.run = Math.min(state.run, page.runs.length - 1);
  if (!runNow().records.length) state.run = Math.max(page.runs.findIndex((run) => run.records.length), 0);
  look(Math.min(state.record, Math.max(runNow().records.length - 1, 0)), state.row, state.token);
  if (!state.other && recordNow()) { // the switch begins with the run's own objective
    const own = ownSettings();
    const same = Object.keys(content.objectives).find((name) => ["importance_sampling_level", "surrogate"].every((field) => content.objectives[name][field] === own[field]));
    if (same) [state.objective, state.settings[same]] = [same, { ...content.objectives[same], ...own }];
  }
  if (!state.other) { // the first other run at its end; of a single run, its beginning
    const run = page.runs.length > 1 ? (state.run === 1 ? 0 : 1) : 0;
    state.other = { run, record: run === state.run ? 0 : Math.max(page.runs[run].records.length - 1, 0) };
  }
}

// Turns to a record and a completion in it, as far as there are such.
function look(record, row = 0, token = 0) {
  state.record = record;
  const now = recordNow();
  state.row = now ? Math.min(row, now.row.length - 1) : 0;
  state.token = now ? Math.min(token, Math.max(now.start[state.row + 1] - now.start[state.row] - 1, 0)) : 0;
}

const recordChoices = (run) => page.runs[run].records.map((record, i) => [i, `rollout ${record.rollout}`]);
const runChoices = () => page.runs.map((run, i) => [i, run.name]);

function drawChooser() {
  const parts = [];
  if (page.runs.length > 1) {
    parts.push(labelled("Run", choice("run", runChoices(), state.run, (value) => {
      state.run = Number(value);
      look(Math.max(runNow().records.length - 1, 0));
      render();
    })));
  } else parts.push(h("span", { class: "faint" }, runNow().name));
  if (runNow().records.length) {
    parts.push(labelled("Recorded", choice("record", recordChoices(state.run), state.record, (value) => {
      look(Number(value), state.row);
      render();
    })));
  }
  document.getElementById("choose").replaceChildren(h("div", { class: "controls" }, parts));
}

const nameOfRow = (record, row) => {
  let place = 0;
  for (let r = row - 1; r >= 0 && record.group[r] === record.group[row]; r--) place++;
  return `prompt ${record.group[row]}, completion ${place}`;
};

// Previous, next, and a list of all completions.
function rowChooser() {
  const record = recordNow(), last = record.row.length - 1;
  const go = (row) => { look(state.record, row); render(); };
  const names = Array.from(record.row, (_, r) => [r, nameOfRow(record, r)]);
  return [
    h("button", { "data-key": "before", disabled: state.row === 0, onclick: () => go(state.row - 1) }, "← Previous"),
    labelled(h("span", { class: "hidden" }, "Completion"), choice("row", names, state.row, (value) => go(Number(value)))),
    h("button", { "data-key": "after", disabled: state.row === last, onclick: () => go(state.row + 1) }, "Next →"),
  ];
}
