// Wiring: controls to state, state to the page.
function setRange(key, low, high, later) {
  if (low === null && high === null) state.ranges.delete(key);
  else {
    const [first, last] = finiteRange({...columns.get(key), log: false});
    low = low === null || low <= first ? -Infinity : low;
    high = high === null || high >= last ? Infinity : high;
    if (low === -Infinity && high === Infinity) state.ranges.delete(key); else state.ranges.set(key, [low, high]);
  }
  if (!later) refresh();
}

function clearFilters() {
  Object.assign(state, {text: '', cls: '', decision: '', suspects: false});
  state.ranges.clear();
  refresh();
}

function drawChips() {
  const chips = [...state.ranges].map(([key, [low, high]]) => {
    const c = columns.get(key), edge = v => figure(scaled(c, v));
    const text = low === -Infinity ? `\u2264 ${edge(high)}` : high === Infinity ? `\u2265 ${edge(low)}` : `${edge(low)} to ${edge(high)}`;
    return el('button', {type: 'button', class: 'chip', 'aria-label': `remove the filter ${c.name} ${text}`, click: () => setRange(key, null, null)}, `${c.name} ${text} ${c.unit} \u00d7`);
  });
  const any = chips.length || state.text || state.cls !== '' || state.decision || state.suspects;
  if (any) chips.push(el('button', {type: 'button', class: 'chip clear', click: clearFilters}, 'clear all'));
  $('chips').replaceChildren(...chips);
}

function drawControls() {
  const c = columns.get(state.hist), range = state.ranges.get(c.key) || [-Infinity, Infinity];
  const put = (id, value) => { if (document.activeElement !== $(id)) $(id).value = value; };
  put('from', range[0] === -Infinity ? '' : String(+scaled(c, range[0]).toPrecision(4)));
  put('to', range[1] === Infinity ? '' : String(+scaled(c, range[1]).toPrecision(4)));
  $('range-unit').textContent = c.unit;
  put('search', state.text);
  for (const [id, value] of [['class', state.cls], ['decision', state.decision], ['hist-by', state.hist], ['scatter-x', state.x], ['scatter-y', state.y]]) $(id).value = value;
  $('only-suspects').checked = state.suspects;
  $('count').textContent = view.length === n ? `${n} samples` : `${view.length} of ${n} samples`;
  const counts = {keep: 0, relabel: 0, drop: 0};
  for (const d of state.decisions.values()) counts[d.what]++;
  $('progress').textContent = state.decisions.size ? `${state.decisions.size} decided: ${counts.keep} keep, ${counts.relabel} relabel, ${counts.drop} drop` : 'Nothing decided yet: K keeps, R relabels, D drops.';
  $('undo').disabled = !state.undo.length;
  $('export').disabled = !state.decisions.size;
  for (const button of document.querySelectorAll('[data-all]')) button.textContent = `${button.dataset.all} ${view.length}`;
}

function drawLegend() {
  if (!data.labels || data.names.length > 20) return;
  $('legend').replaceChildren(...data.names.map((name, c) => el('button', {type: 'button', class: 'tag', 'aria-pressed': String(state.cls === String(c)), title: `show only ${name}`,
    click() { state.cls = state.cls === String(c) ? '' : String(c); refresh(); }}, ...tag(c).childNodes)));
}

function refresh() {
  filterRows();
  if (!shown.has(state.current)) state.current = view.length ? view[0] : -1;
  const focused = document.activeElement, legend = focused?.parentElement?.id === 'legend' ? [...focused.parentElement.children].indexOf(focused) : -1;
  drawControls();
  drawChips();
  drawHead();
  drawLegend();
  if (legend >= 0) $('legend').children[legend]?.focus();
  drawHistogram();
  drawScatter();
  drawSuspects();
  const box = $('scroll');
  if (box.scrollTop > view.length * ROW) box.scrollTop = 0;
  drawRows();
  drawDetail();
}

function theme(change) {
  const root = document.documentElement, order = ['auto', 'light', 'dark'];
  let now = root.dataset.theme || 'auto';
  try { now = change ? now : localStorage.getItem('sui_fast:theme') || now; } catch { /* no storage */ }
  if (change) now = order[(order.indexOf(now) + 1) % 3];
  if (!order.includes(now)) now = 'auto';
  if (now === 'auto') delete root.dataset.theme; else root.dataset.theme = now;
  $('theme').textContent = `Theme: ${now}`;
  try { if (change) localStorage.setItem('sui_fast:theme', now); } catch { /* no storage */ }
  if (change) { drawHistogram(); drawScatter(); }
}

function onKey(event) {
  const at = event.target, typing = at.closest?.('input:not([type=checkbox]), select, textarea'), key = event.key;
  if (document.querySelector('dialog[open]')) return;
  if (key === 'Escape') { if (typing) at.blur(); else clearFilters(); return; }
  if (typing) return;
  if ((event.ctrlKey || event.metaKey) && key.toLowerCase() === 'z' && !event.shiftKey) { event.preventDefault(); undo(); return; }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inTable = at === document.body || at.closest?.('.work');
  const page = Math.max(1, Math.floor($('scroll').clientHeight / ROW) - 2);
  const moves = {ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -n, End: n};
  if (key in moves && inTable && (at !== document.body || key.startsWith('Arrow'))) { event.preventDefault(); step(moves[key]); return; }
  const letters = {k: () => decideCurrent('keep'), r: () => decideCurrent('relabel'), d: () => decideCurrent('drop'), u: undo, l: () => $('new-label')?.focus(), '/': () => $('search').focus(), '?': () => $('help').showModal()};
  const action = letters[key.toLowerCase()];
  if (!action) return;
  event.preventDefault();
  const back = at.closest?.('#detail');
  action();
  if (back && 'krdu'.includes(key.toLowerCase()) && document.activeElement === document.body) $('table').focus({preventScroll: true});
}

function start() {
  const options = keep => data.columns.filter(keep || (() => true)).map(c => el('option', {value: c.key}, c.name));
  for (const id of ['hist-by', 'scatter-x', 'scatter-y', 'gallery-by']) if ($(id)) $(id).append(...options());
  if ($('gallery-by')) $('gallery-by').value = data.start.sort;
  $('class').append(...data.names.map((name, c) => el('option', {value: String(c)}, name)));
  document.documentElement.classList.toggle('no-classes', !data.labels);
  document.documentElement.classList.toggle('no-review', !reviewing);
  document.documentElement.classList.toggle('no-suspects', !data.suspects.length);
  recall();
  startTable();
  startPlots();
  theme(false);
  const on = (id, kind, action) => $(id)?.addEventListener(kind, action);
  on('search', 'input', event => { state.text = event.target.value; refresh(); });
  on('class', 'change', event => { state.cls = event.target.value; refresh(); });
  on('decision', 'change', event => { state.decision = event.target.value; refresh(); });
  on('only-suspects', 'change', event => { state.suspects = event.target.checked; refresh(); });
  on('hist-by', 'change', event => { state.hist = event.target.value; refresh(); });
  on('scatter-x', 'change', event => { state.x = event.target.value; refresh(); });
  on('scatter-y', 'change', event => { state.y = event.target.value; refresh(); });
  for (const id of ['from', 'to']) on(id, 'change', () => {
    const c = columns.get(state.hist), read = name => { const v = parseFloat($(name).value.replace(',', '.').replace('\u2212', '-')); return Number.isFinite(v) ? v * 10 ** c.exponent : null; };
    const low = read('from'), high = read('to');
    setRange(c.key, low, high);
  });
  on('gallery-by', 'change', drawGallery);
  on('undo', 'click', undo);
  on('export', 'click', save);
  on('clear', 'click', clearFilters);
  for (const button of document.querySelectorAll('[data-all]')) button.addEventListener('click', () => { decide([...view], button.dataset.all); refresh(); });
  on('review-suspects', 'click', reviewSuspects);
  on('more-suspects', 'click', () => { cards += 24; drawSuspects(); });
  on('theme', 'click', () => theme(true));
  on('keys', 'click', () => $('help').showModal());
  on('close-help', 'click', () => $('help').close());
  document.addEventListener('keydown', onKey);
  let waiting = 0;
  window.addEventListener('resize', () => { clearTimeout(waiting); waiting = setTimeout(() => { drawHistogram(); drawScatter(); drawRows(); }, 80); });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => { drawHistogram(); drawScatter(); });
  loadSheets().then(() => { refresh(); drawGallery(); document.documentElement.dataset.ready = 'yes'; });
}
start();
