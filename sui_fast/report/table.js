// The table: only the rows in sight exist, so that ten thousand scroll as ten do.
const ROW = data.thumbs ? 44 : 34;
const heads = [];
function tableColumns() {
  heads.push({key: 'decision', name: 'review', cell: i => mark(i), narrow: true, hide: !data.review});
  if (data.thumbs) heads.push({name: 'picture', cell: i => picture(i, ROW - 6)});
  heads.push({key: 'id', name: 'id', cell: i => data.ids[i], class: 'id'});
  if (data.labels) heads.push({key: 'label', name: 'label', cell: i => tag(data.labels[i])});
  if (data.suggested) heads.push({key: 'suggested', name: 'suggested', cell: i => data.suggested[i] === data.labels[i] ? el('span', {class: 'soft'}, 'same') : tag(data.suggested[i])});
  for (const c of data.columns) {
    heads.push({key: c.key, name: unitName(c), title: c.about, number: true, cell: i => show(c, i), raw: i => c.values[i]});
  }
  if (data.texts) heads.push({key: 'input', name: 'text', cell: i => plain(i, 160), class: 'text'});
  else if (data.inputs) heads.push({name: 'input', cell: i => plain(i, 72), class: 'text'});
  for (let k = heads.length - 1; k >= 0; k--) if (heads[k].hide) heads.splice(k, 1);
}

function mark(i) {
  const d = state.decisions.get(i);
  if (!d) return null;
  return el('span', {class: `mark ${d.what}`, title: d.what === 'relabel' ? `relabel: ${newLabelName(d)}` : d.what}, d.what === 'relabel' ? `\u2192 ${newLabelName(d)}` : d.what);
}

function drawHead() {
  const cells = heads.map(h => {
    const sorted = h.key === state.sort ? (state.descending ? 'descending' : 'ascending') : h.key ? 'none' : null;
    const arrow = sorted === 'descending' ? ' \u25be' : sorted === 'ascending' ? ' \u25b4' : '';
    const inside = h.key ? el('button', {type: 'button', 'data-key': h.key}, h.name + arrow) : h.name;
    return el('th', {scope: 'col', class: h.number ? 'number' : h.class === 'text' ? 'text' : null, 'aria-sort': sorted, title: h.title || null, click: h.key ? () => sortBy(h.key) : null}, inside);
  });
  const focused = document.activeElement?.dataset?.key;
  $('head').replaceChildren(el('tr', {}, ...cells));
  if (focused) [...$('head').querySelectorAll('button')].find(b => b.dataset.key === focused)?.focus();
}

function sortBy(key) {
  if (state.sort === key) state.descending = !state.descending;
  else { state.sort = key; state.descending = columns.has(key) && key !== 'loo_margin'; }
  refresh();
  $('scroll').scrollTop = 0;
  drawRows();
}

function drawRows() {
  const box = $('scroll'), first = Math.max(0, Math.floor(box.scrollTop / ROW) - 6), last = Math.min(view.length, first + Math.ceil(box.clientHeight / ROW) + 14);
  const spacer = rows => {
    const cell = el('td', {colspan: heads.length, class: 'spacer', 'aria-hidden': 'true'});
    cell.style.height = `${rows * ROW}px`;
    return el('tr', {class: 'spacer', role: 'presentation'}, cell);
  };
  const body = [];
  if (first > 0) body.push(spacer(first));
  for (let at = first; at < last; at++) {
    const i = view[at], d = state.decisions.get(i);
    const cells = heads.map(h => {
      const content = h.cell(i);
      return el('td', {class: [h.number && 'number', h.class].filter(Boolean).join(' ') || null, title: h.raw && h.raw(i) !== null ? String(h.raw(i)) : null}, content);
    });
    body.push(el('tr', {
      id: `row-${i}`, 'data-row': i, 'aria-rowindex': at + 2, 'aria-selected': String(i === state.current),
      class: [i === state.current && 'current', d && d.what].filter(Boolean).join(' ') || null,
    }, ...cells));
  }
  if (last < view.length) body.push(spacer(view.length - last));
  $('rows').replaceChildren(...body);
  $('table').setAttribute('aria-rowcount', view.length + 1);
  $('table').classList.toggle('tall', ROW > 40);
  if (state.current >= 0 && shown.has(state.current)) $('table').setAttribute('aria-activedescendant', `row-${state.current}`);
  else $('table').removeAttribute('aria-activedescendant');
  $('nothing').hidden = view.length > 0;
}

function scrollToCurrent() {
  const at = view.indexOf(state.current), box = $('scroll'), head = $('head').offsetHeight;
  if (at < 0) return;
  const top = at * ROW, room = box.clientHeight - head;
  if (top < box.scrollTop) box.scrollTop = top;
  else if (top + ROW > box.scrollTop + room) box.scrollTop = top + ROW - room;
}

// Make a sample the current one and show it everywhere.
function choose(i, quiet) {
  state.current = i;
  scrollToCurrent();
  drawRows();
  drawDetail();
  overScatter();
  if (!quiet && i >= 0) {
    const d = state.decisions.get(i);
    $('said').textContent = `${data.ids[i]}${data.labels ? ', label ' + labelName(i) : ''}${d ? ', ' + d.what : ''}`;
  }
}

function step(by) {
  if (!view.length) return;
  const at = view.indexOf(state.current);
  choose(view[at < 0 ? 0 : Math.min(view.length - 1, Math.max(0, at + by))]);
}

function startTable() {
  tableColumns();
  $('scroll').addEventListener('scroll', () => requestAnimationFrame(drawRows), {passive: true});
  $('rows').addEventListener('click', event => {
    const row = event.target.closest('tr[data-row]');
    if (row) { choose(+row.dataset.row); $('table').focus({preventScroll: true}); }
  });
  $('table').addEventListener('focus', scrollToCurrent);
}
