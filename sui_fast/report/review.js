// Decisions, undo, the panel of the current sample, suspected labels, export.
const KEEP = `sui_fast:${data.key}`;
const newLabelName = d => data.labels ? className(d.label) : d.label;
const reviewing = data.review;

function firstGuess(i) {
  const d = state.decisions.get(i);
  if (d && d.what === 'relabel') return d.label;
  if (!data.labels) return '';
  if (data.suggested && data.suggested[i] !== data.labels[i]) return data.suggested[i];
  const other = neighbours(i, 'other')[0];
  if (other) return data.labels[other.row];
  return data.classes.findIndex((_, c) => c !== data.labels[i]);
}

// Decide some rows at once; one step of undo.
function decide(rows, what, label) {
  const before = rows.map(i => [i, state.decisions.get(i)]);
  for (const i of rows) {
    if (what === null) state.decisions.delete(i);
    else state.decisions.set(i, what === 'relabel' ? {what, label} : {what});
  }
  state.undo.push({before, current: state.current});
  remember();
}

function decideCurrent(what) {
  const i = state.current;
  if (i < 0 || !reviewing) return;
  let label;
  if (what === 'relabel') {
    const field = $('new-label');
    if (!field) { $('said').textContent = 'There is no other label.'; return; }
    label = data.labels ? +field.value : field.value.trim();
    if (data.labels ? !(label >= 0) || label === data.labels[i] : !label) {
      field.focus();
      $('said').textContent = 'Choose a label that differs from the present one.';
      return;
    }
  }
  const at = view.indexOf(i), next = view[at + 1] ?? view[at - 1] ?? i;
  decide([i], what, label);
  refresh();
  choose(shown.has(next) || !shown.has(i) ? (view.includes(next) ? next : view[Math.min(at, view.length - 1)] ?? -1) : i, true);
  $('said').textContent = `${data.ids[i]}: ${what}${what === 'relabel' ? ' as ' + newLabelName({label}) : ''}. Now ${state.current >= 0 ? data.ids[state.current] : 'nothing'}.`;
}

function undo() {
  const last = state.undo.pop();
  if (!last) return;
  for (const [i, d] of last.before) { if (d) state.decisions.set(i, d); else state.decisions.delete(i); }
  remember();
  refresh();
  choose(last.current, true);
  $('said').textContent = `Undone: ${last.before.length === 1 ? data.ids[last.before[0][0]] : last.before.length + ' samples'}.`;
}

// Decisions outlive the page where the browser lets files keep something. The tab keeps a copy: Chromium reads
// localStorage as empty where a page is reloaded while it is written to disk, some seconds after a change.
const stores = () => [() => localStorage, () => sessionStorage].flatMap(store => { try { return [store()]; } catch { return []; } });
function remember() {
  const kept = [...state.decisions].map(([i, d]) => [i, d.what, d.label ?? null]);
  for (const store of stores()) {
    try { if (kept.length) store.setItem(KEEP, JSON.stringify(kept)); else store.removeItem(KEEP); } catch { /* full */ }
  }
}
function recall() {
  try {
    const kept = stores().map(store => store.getItem(KEEP)).find(Boolean) || '[]';
    for (const [i, what, label] of JSON.parse(kept)) {
      const known = what === 'keep' || what === 'drop' || (what === 'relabel' && (data.labels ? label in data.classes : typeof label === 'string'));
      if (Number.isInteger(i) && i >= 0 && i < n && known) state.decisions.set(i, what === 'relabel' ? {what, label} : {what});
    }
  } catch { /* nothing kept, or not ours */ }
}

function csv() {
  const inert = x => /^'*\s*[=+\-@][^]*[(|![]/.test(x) ? `'${x}` : x;  // what a spreadsheet would run; read_review takes it off
  const quoted = x => /[",\r\n]/.test(x) || x !== x.trim() ? `"${x.replaceAll('"', '""')}"` : x, quote = x => quoted(inert(x));
  const value = c => data.labels ? data.classes[c] : c;
  const lines = [...state.decisions].sort(([a], [b]) => a - b).map(([i, d]) => {
    const old = data.labels ? value(data.labels[i]) : '';
    return [data.ids[i], d.what, old, d.what === 'relabel' ? value(d.label) : old].map(quote).join(',');
  });
  return ['id,decision,label,new_label', ...lines].join('\r\n') + '\r\n';
}
function save() {
  const link = el('a', {download: 'review.csv', href: URL.createObjectURL(new Blob([csv()], {type: 'text/csv'}))});
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  $('said').textContent = `Exported ${state.decisions.size} decisions.`;
}

function percentile(c, i) {
  if (c.values[i] === null) return null;
  c.sorted ||= c.values.filter(v => v !== null).sort((a, b) => a - b);
  let low = 0, high = c.sorted.length;
  while (low < high) { const m = (low + high) >> 1; if (c.sorted[m] < c.values[i]) low = m + 1; else high = m; }
  return c.sorted.length > 1 ? Math.round(100 * low / (c.sorted.length - 1)) : 50;
}

function neighbourList(i, kind, title) {
  const found = neighbours(i, kind);
  if (!found.length) return null;
  const items = found.map(({row, similarity}) => el('li', {}, el('button', {type: 'button', class: 'neighbour', title: `${data.ids[row]}: similarity ${similarity / 100}`, click: () => choose(row)},
    picture(row, 44), el('span', {}, el('b', {}, data.ids[row]), ' ', tag(data.labels ? data.labels[row] : null),
      data.thumbs ? null : el('span', {class: 'clip'}, plain(row, 90)), el('span', {class: 'soft'}, ` ${similarity}%`)))));
  return el('div', {}, el('h4', {}, title), el('ul', {class: data.thumbs ? 'near' : 'near lines'}, ...items));
}

function drawDetail() {
  const i = state.current, box = $('detail');
  if (i < 0) { box.replaceChildren(el('p', {class: 'soft'}, 'No sample chosen.')); return; }
  const numbers = data.columns.map(c => {
    const p = percentile(c, i), meter = el('span', {class: 'meter', 'aria-hidden': 'true'}, el('i', {}));
    meter.firstChild.style.width = `${p ?? 0}%`;
    return el('tr', {title: c.about || null}, el('th', {scope: 'row'}, c.name, c.unit ? el('span', {class: 'soft'}, ' ' + c.unit) : null), el('td', {}, show(c, i)), el('td', {class: 'rank'}, meter, el('span', {class: 'soft'}, p === null ? '' : `${p}%`)));
  });
  const wrong = data.suggested && data.labels && data.suggested[i] !== data.labels[i];
  const about = el('div', {class: 'about'}, picture(i, 96), el('div', {}, el('h3', {}, data.ids[i]),
    data.labels ? el('div', {}, el('span', {class: 'soft'}, 'label '), tag(data.labels[i])) : null,
    wrong ? el('div', {}, el('span', {class: 'soft'}, 'the others say '), tag(data.suggested[i])) : null,
    mark(i)));
  const text = data.texts ? el('p', {class: 'whole', tabindex: 0}, data.texts[i]) : data.inputs ? el('p', {class: 'whole numbers', tabindex: 0}, data.inputs[i].map(v => figure(v)).join('  '), data.features > data.inputs[i].length ? `  \u2026 (${data.features})` : null) : null;
  const by = data.neighbours && data.neighbours.by === 'kernel' ? 'by the kernel' : 'by their inputs';
  box.replaceChildren(...[about, text, reviewing ? buttons(i) : null,
    el('table', {class: 'numbers'}, el('thead', {}, el('tr', {}, el('th', {scope: 'col'}, 'measure'), el('th', {scope: 'col'}, 'value'), el('th', {scope: 'col'}, 'percentile'))), el('tbody', {}, ...numbers)),
    neighbourList(i, 'other', `Nearest of another class, ${by}`),
    neighbourList(i, 'same', data.labels ? `Nearest of its class, ${by}` : `Nearest, ${by}`)].filter(Boolean));
}

function buttons(i) {
  const guess = firstGuess(i);
  const field = data.labels
    ? el('select', {id: 'new-label', 'aria-label': 'New label'}, ...data.names.map((name, c) => el('option', {value: String(c), disabled: c === data.labels[i]}, name)))
    : el('input', {id: 'new-label', 'aria-label': 'New label', size: 10, value: guess});
  if (data.labels) field.value = String(guess);
  field.addEventListener('keydown', event => { if (event.key === 'Enter') { event.preventDefault(); decideCurrent('relabel'); $('table').focus({preventScroll: true}); } });
  const now = state.decisions.get(i)?.what;
  const button = (what, key, ...more) => el('button', {type: 'button', class: what, 'data-decide': what, 'aria-pressed': String(now === what), click: () => decideCurrent(what)}, el('span', {}, what), ...more, el('kbd', {}, key));
  return el('div', {class: 'decide', role: 'group', 'aria-label': 'Decision'}, button('keep', 'K'), button('drop', 'D'), data.labels && data.classes.length < 2 ? null : el('span', {class: 'relabelling'}, button('relabel', 'R'), el('span', {class: 'soft'}, 'as'), field));
}

// Cards of suspected labels, a page at a time.
let cards = 12;
function drawSuspects() {
  if (!$('suspect-list')) return;
  $('suspect-count').textContent = data.suspects.length ? `${data.suspects.length} of ${n} samples` : 'None found, or no measure that could tell: score with measures="loo_margin".';
  $('review-suspects').hidden = !data.suspects.length || !reviewing;
  $('more-suspects').hidden = cards >= data.suspects.length;
  $('suspect-list').replaceChildren(...data.suspects.slice(0, cards).map(i => {
    const margin = columns.get('loo_margin'), against = neighbours(i, 'other'), now = state.decisions.get(i)?.what;
    const button = what => el('button', {type: 'button', class: what, 'aria-pressed': String(now === what), 'aria-label': `${what} ${data.ids[i]}`, click: () => suspect(i, what)}, what);
    return el('li', {class: `card ${now || ''}`},
      el('div', {class: 'about'}, picture(i, 76), el('div', {}, el('button', {type: 'button', class: 'link', click: () => goTo(i)}, data.ids[i]),
        el('div', {}, tag(data.labels[i]), data.suggested && data.suggested[i] !== data.labels[i] ? el('span', {class: 'arrow'}, ' \u2192 ', tag(data.suggested[i])) : null),
        margin ? el('div', {class: 'soft'}, `margin ${show(margin, i)}`) : null)),
      data.thumbs ? null : el('p', {class: 'clip three'}, plain(i, 240)),
      against.length ? el('ul', {class: data.thumbs ? 'near' : 'near lines'}, ...against.map(({row, similarity}) => el('li', {title: `${data.ids[row]}, similarity ${similarity / 100}`}, picture(row, 36), tag(data.labels[row]), data.thumbs ? null : el('span', {class: 'clip'}, plain(row, 70))))) : null,
      reviewing ? el('div', {class: 'decide small'}, button('keep'), button('relabel'), button('drop')) : null);
  }));
}
function suspect(i, what) {
  const guess = firstGuess(i);
  if (what === 'relabel' && !(guess >= 0)) return goTo(i);
  const place = [...document.activeElement?.parentElement?.children || []].indexOf(document.activeElement), card = data.suspects.indexOf(i);
  decide([i], state.decisions.get(i)?.what === what ? null : what, guess);
  refresh();
  $('suspect-list').children[card]?.querySelectorAll('.decide button')[place]?.focus();
}
function goTo(i) {
  if (!shown.has(i)) clearFilters();
  choose(i);
  $('explore').scrollIntoView();
  $('table').focus({preventScroll: true});
}
function reviewSuspects() {
  clearFilters();
  state.suspects = true;
  state.sort = columns.has('loo_margin') ? 'loo_margin' : state.sort;
  state.descending = !columns.has('loo_margin');
  refresh();
  choose(view.find(i => !state.decisions.has(i)) ?? view[0] ?? -1);
  document.querySelector('.work').scrollIntoView();
  $('table').focus({preventScroll: true});
}

function drawGallery() {
  if (!$('gallery-by')) return;
  const c = columns.get($('gallery-by').value), order = [...Array(n).keys()].filter(i => c.values[i] !== null).sort((a, b) => c.values[a] - c.values[b] || a - b);
  const fill = (id, rows) => $(id).replaceChildren(...rows.map(i => el('li', {}, el('button', {type: 'button', class: 'card', click: () => goTo(i)},
    picture(i, 68), el('b', {}, data.ids[i]), tag(data.labels ? data.labels[i] : null), data.thumbs ? null : el('span', {class: 'clip three'}, plain(i, 110)), el('span', {class: 'soft'}, `${show(c, i)} ${c.unit}`)))));
  fill('most', order.slice(-12).reverse());
  fill('least', order.slice(0, 12));
  $('most-title').textContent = `Most informative by ${c.name}`;
  $('least-title').textContent = `Least informative by ${c.name}`;
  if (c.key.startsWith('loo_')) { $('most-title').textContent = `Largest ${c.name}`; $('least-title').textContent = `Smallest ${c.name}`; }
}
