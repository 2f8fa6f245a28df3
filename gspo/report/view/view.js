// Tabs, drawing, and news from a run that is still writing.

const VIEWS = [
  ["overview", "Runs", drawOverview, false], ["rollout", "Rollout", drawRollout, true], ["completion", "Completion", drawCompletion, true],
  ["objectives", "Objectives", drawObjectives, true], ["layers", "Layers", drawLayers, true], ["scatter", "Scatter", drawScatter, true],
  ["compare", "Compare", drawCompare, true],
];

// Draws all anew; who had the focus keeps it.
function render() {
  const held = document.activeElement && document.activeElement.dataset && document.activeElement.dataset.key;
  const [, , draw, needsRecord] = VIEWS.find(([name]) => name === state.tab);
  drawChooser();
  drawTabs();
  const panel = document.getElementById("panel");
  panel.setAttribute("aria-labelledby", `tab-${state.tab}`);
  const missing = needsRecord && !recordNow();
  panel.replaceChildren(...(missing ? [h("p", {}, "This run has no record of tokens. --config.log.tokens_every=N writes one for each rollout of N.")]
    : draw().flat(Infinity).filter(Boolean)));
  document.getElementById("notes").replaceChildren(...page.runs.flatMap((run) => run.notes.map((note) => h("p", {}, note))));
  if (held) document.querySelector(`[data-key="${CSS.escape(held)}"]`)?.focus({ preventScroll: true });
}

function drawTabs() {
  document.getElementById("tabs").replaceChildren(...VIEWS.map(([name, title]) => h("button", {
    role: "tab", id: `tab-${name}`, "data-key": `tab-${name}`, "aria-controls": "panel",
    "aria-selected": String(name === state.tab), tabindex: name === state.tab ? "0" : "-1", onclick: () => turnTo(name),
  }, title)));
}

function turnTo(name) {
  state.tab = name;
  render();
  const tab = document.getElementById(`tab-${name}`);
  tab.focus({ preventScroll: true });
  tab.scrollIntoView({ block: "nearest", inline: "nearest" });
}

document.getElementById("tabs").addEventListener("keydown", (event) => {
  const at = VIEWS.findIndex(([name]) => name === state.tab), last = VIEWS.length - 1;
  const to = { ArrowRight: at === last ? 0 : at + 1, ArrowLeft: at === 0 ? last : at - 1, Home: 0, End: last }[event.key];
  if (to !== undefined) { event.preventDefault(); turnTo(VIEWS[to][0]); }
});

// Served: asks now and then whether the run has written something, and takes it over.
function follow() {
  let known = null;
  const look = async () => {
    try {
      const version = await (await fetch("version", { cache: "no-store" })).text();
      if (known !== null && version !== known) {
        begin(await unpack(await (await fetch("data", { cache: "no-store" })).text()));
        render();
        document.getElementById("said").textContent = "The run has written something new; it is shown.";
      }
      known = version;
    } catch {
      document.getElementById("said").textContent = "The server does not answer.";
    }
    setTimeout(look, 5000);
  };
  look();
}

async function main() {
  try {
    begin(await unpack(document.getElementById("data").textContent));
  } catch (error) {
    document.getElementById("panel").replaceChildren(h("p", {}, `This page cannot be read: ${error.message}`));
    throw error;
  }
  render();
  document.documentElement.dataset.ready = "yes";
  if (document.documentElement.dataset.live === "yes") follow();
}
main();
