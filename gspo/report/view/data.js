// What the page holds -> runs with their records, and what is computed from a record's columns.

const TYPES = { int32: Int32Array, uint8: Uint8Array, float32: Float32Array };

async function unpack(base64) {
  const text = atob(base64.trim()), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const content = await new Response(stream).arrayBuffer();
  const length = new DataView(content).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(content, 4, length)));
  for (const run of header.runs) {
    run.records = run.records.map((record) => withArrays(record, content, 4 + length));
  }
  return header;
}

function withArrays(record, content, behind) {
  const columns = {};
  for (const [name, { at, dtype, size }] of Object.entries(record.arrays)) {
    columns[name] = new TYPES[dtype](content, behind + at, size);
  }
  return derived({ ...record, ...columns, arrays: undefined });
}

// logW, shift: of each token; logS, counted (tokens that count): of each row; layersChanged: of each token of a MoE.
function derived(record) {
  const N = record.token.length, R = record.row.length;
  record.logW = new Float64Array(N);
  record.shift = new Float64Array(N);
  record.rowOf = new Int32Array(N);
  record.logS = new Float64Array(R);
  record.counted = new Int32Array(R);
  for (let r = 0; r < R; r++) {
    let total = 0, count = 0;
    for (let t = record.start[r]; t < record.start[r + 1]; t++) {
      record.rowOf[t] = r;
      record.shift[t] = record.after_logp[t] - record.old_logp[t];
      record.logW[t] = record.logp[t] - record.old_logp[t];
      if (record.mask[t]) { total += record.logW[t]; count++; }
    }
    record.logS[r] = count ? total / count : 0;
    record.counted[r] = count;
  }
  if (record.layers) record.layersChanged = layersChanged(record, N);
  record.promptOf = new Map(record.prompts.map((prompt) => [prompt.group, prompt]));
  record.weighed = new Map();
  return record;
}

function layersChanged(record, N) {
  const L = record.layers, count = new Uint8Array(N);
  for (let t = 0; t < N; t++) {
    for (let l = 0; l < L; l++) count[t] += experts(record, t, l) > 0;
  }
  return count;
}

// How many experts changed for a token in a layer; 0 where that was not recorded.
function experts(record, t, layer) {
  const changed = record.changed[t * record.layers + layer];
  return changed === 255 ? 0 : changed;
}

// What an objective makes of a record, each row in the minibatch that it was trained in. Kept for the last settings.
function weighed(record, settings) {
  const key = JSON.stringify(settings);
  if (!record.weighed.has(key)) {
    if (record.weighed.size > 24) record.weighed.clear();
    const counts = (row) => ({
      rows: record.updates.rows[record.update[row]], tokens: record.updates.tokens[record.update[row]],
    });
    record.weighed.set(key, weigh(settings, { ...record, counts }));
  }
  return record.weighed.get(key);
}

// Tokens and sequences of a record that are clipped.
function shares(record, found) {
  let tokens = 0, low = 0, high = 0, sequences = 0, rows = 0, weight = 0;
  for (let r = 0; r < record.row.length; r++) {
    let cut = false;
    for (let t = record.start[r]; t < record.start[r + 1]; t++) {
      if (!record.mask[t]) continue;
      tokens++;
      low += found.low[t];
      high += found.high[t];
      weight += Math.abs(found.weight[t]);
      cut = cut || found.low[t] || found.high[t];
    }
    rows += record.counted[r] > 0;
    sequences += cut ? 1 : 0;
  }
  return { tokens, low, high, sequences, rows, weight };
}

// {low, high} of the tokens of one row.
function cutInRow(record, found, row) {
  let low = 0, high = 0;
  for (let t = record.start[row]; t < record.start[row + 1]; t++) { low += found.low[t]; high += found.high[t]; }
  return { low, high };
}
