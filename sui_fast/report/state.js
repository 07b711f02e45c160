// Data, what is shown of it, and small helpers. Text from the data only ever becomes text nodes and attribute values.
const data = JSON.parse(document.getElementById('data').textContent);
const n = data.ids.length;
const columns = new Map(data.columns.map(c => [c.key, c]));
const suspects = new Set(data.suspects);
const state = {
  text: '', cls: '', decision: '', suspects: false, ranges: new Map(),
  sort: data.start.sort, descending: data.start.descending, current: -1,
  x: data.start.x, y: data.start.y, hist: data.start.hist,
  decisions: new Map(), undo: [],
};
let view = [];       // rows that pass the filters, in order
let shown = new Set();

const $ = id => document.getElementById(id);

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === 'function') node.addEventListener(name, value);
    else if (name === 'class') node.className = value;
    else if (name in {value: 1, checked: 1, disabled: 1, hidden: 1}) node[name] = value;
    else node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.filter(c => c !== null && c !== undefined));
  return node;
}

const className = c => c === null || c < 0 ? '' : data.names[c];
const labelName = i => data.labels ? className(data.labels[i]) : '';
const colourOf = c => `var(--c${((c % 10) + 10) % 10})`;
const unitName = c => c.unit ? `${c.name} (${c.unit})` : c.name;

function figure(value, digits = 3) {
  if (value === null || value === undefined) return '\u2013';
  const size = Math.abs(value);
  if (size === 0) return '0';
  if (size >= 1e5 || size < 1e-3) return value.toExponential(digits - 1).replace('e+', 'e').replace('-', value < 0 ? '\u2212' : '-');
  const places = Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
  return value.toFixed(Math.min(places, 6)).replace(/^-/, '\u2212');
}
const scaled = (c, value) => value === null ? null : value / 10 ** c.exponent;
const show = (c, i) => figure(scaled(c, c.values[i]));

// Neighbours of a row: [{row, similarity}], of another class or of the same.
const neighbourRow = data.neighbours && data.neighbours.rows ? new Map(data.neighbours.rows.map((r, i) => [r, i])) : null;
function neighbours(i, kind) {
  const found = data.neighbours, at = !found ? undefined : neighbourRow ? neighbourRow.get(i) : i;
  if (at === undefined) return [];
  return found[kind][at].map((row, q) => ({row, similarity: found[kind + '_similarity'][at][q]})).filter(x => x.row >= 0);
}

// The text of a row that the search looks at, made once.
let hay = null;
function haystack() {
  return hay ||= data.ids.map((id, i) => `${id}\n${labelName(i)}\n${data.texts ? data.texts[i] : ''}`.toLowerCase());
}

function filterRows() {
  const needle = state.text.trim().toLowerCase(), texts = needle ? haystack() : null;
  const ranges = [...state.ranges].map(([key, [low, high]]) => [columns.get(key).values, low, high]);
  const found = [];
  rows: for (let i = 0; i < n; i++) {
    if (state.cls !== '' && data.labels[i] !== +state.cls) continue;
    if (state.suspects && !suspects.has(i)) continue;
    if (state.decision) {
      const d = state.decisions.get(i);
      if (state.decision === 'none' ? d : !d || d.what !== state.decision) continue;
    }
    for (const [values, low, high] of ranges) {
      const v = values[i];
      if (v === null || v < low || v > high) continue rows;
    }
    if (needle && !texts[i].includes(needle)) continue;
    found.push(i);
  }
  view = sortRows(found);
  shown = new Set(view);
}

function sortRows(rows) {
  const key = state.sort, sign = state.descending ? -1 : 1, c = columns.get(key);
  let compare;
  if (c) {
    const value = c.absolute ? i => c.values[i] === null ? null : Math.abs(c.values[i]) : i => c.values[i];
    compare = (a, b) => {
      const x = value(a), y = value(b);
      if (x === null || y === null) return (x === null) - (y === null);  // missing values stay at the end
      return sign * (x - y);
    };
  } else if (key === 'id' && data.numeric) compare = (a, b) => sign * (Number(data.ids[a]) - Number(data.ids[b]));
  else {
    const order = new Intl.Collator(undefined, {numeric: true}).compare;
    const words = {
      id: i => data.ids[i], label: labelName, suggested: i => data.suggested ? className(data.suggested[i]) : '',
      input: i => data.texts ? data.texts[i] : '', decision: i => state.decisions.get(i)?.what || '~',
    }[key];
    compare = (a, b) => sign * order(words(a), words(b));
  }
  return rows.sort((a, b) => compare(a, b) || a - b);
}

// Thumbnails: tiles of sheets that are decoded once.
const sheets = [];
function loadSheets() {
  if (!data.thumbs) return Promise.resolve();
  return Promise.all(data.thumbs.sheets.map((source, s) => new Promise(done => {
    const image = new Image();
    image.onload = image.onerror = done;
    image.src = source;
    sheets[s] = image;
  })));
}
const tileOf = i => !data.thumbs ? -1 : data.thumbs.place ? data.thumbs.place[i] : i;

function picture(i, size) {
  const tile = tileOf(i), {width, height, row, sheet} = data.thumbs || {};
  if (tile < 0) return null;
  const ratio = size / Math.max(width, height), dpr = window.devicePixelRatio || 1;
  const w = Math.max(1, Math.round(width * ratio)), h = Math.max(1, Math.round(height * ratio));
  const canvas = el('canvas', {class: 'thumb', role: 'img', 'aria-label': `picture of ${data.ids[i]}`, width: w * dpr, height: h * dpr});
  canvas.style.width = `${w}px`;
  canvas.style.height = `${h}px`;
  const context = canvas.getContext('2d'), image = sheets[Math.floor(tile / sheet)], place = tile % sheet;
  context.imageSmoothingEnabled = width > 20;
  context.imageSmoothingQuality = 'high';
  if (image && image.naturalWidth) {
    context.drawImage(image, (place % row) * width, Math.floor(place / row) * height, width, height, 0, 0, w * dpr, h * dpr);
  }
  return canvas;
}

// What a sample is, in one line.
function plain(i, most) {
  if (data.texts) return data.texts[i].length > most ? data.texts[i].slice(0, most) + '\u2026' : data.texts[i];
  if (data.inputs) return data.inputs[i].slice(0, Math.max(3, Math.floor(most / 9))).map(v => figure(v)).join('  ');
  return '';
}

function tag(c) {
  if (c === null || c === undefined || c < 0) return null;
  const dot = el('span', {class: 'dot', 'aria-hidden': 'true'});
  dot.style.background = colourOf(c);
  return el('span', {class: 'tag', title: className(c)}, dot, className(c));
}
