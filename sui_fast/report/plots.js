// Histogram and scatter plot on canvases, linked by the filters: dragging sets the ranges of the measures shown.
const styleOf = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function axisOf(c, low, high) {
  let log = c.log && high > 0;
  if (log && !(low > 0)) low = high / 1e12;
  if (!(high > low)) { const pad = Math.abs(high) * 0.1 || 1; low -= pad; high += pad; log = log && low > 0; }
  const to = log ? v => Math.log10(Math.max(v, low)) : v => v, a = to(low), b = to(high), pad = (b - a) * 0.03;
  const from = log ? u => 10 ** u : u => u;
  return {log, low: a - pad, high: b + pad, share: v => (to(v) - a + pad) / (b - a + 2 * pad), value: s => from(a - pad + s * (b - a + 2 * pad))};
}

function finiteRange(c, keys = [c]) {
  let low = Infinity, high = -Infinity;
  for (const k of keys) for (const v of k.values) {
    if (v === null || (c.log && v <= 0)) continue;
    if (v < low) low = v;
    if (v > high) high = v;
  }
  return low <= high ? [low, high] : [0, 1];
}

function ticks(axis, c) {
  const unit = 10 ** c.exponent, found = [];
  if (axis.log) {
    const span = axis.high - axis.low, marks = span > 2.2 ? [1] : span > 1.1 ? [1, 3] : [1, 2, 5], step = Math.max(1, Math.ceil(span / 6));
    for (let e = Math.floor(axis.low); e <= Math.ceil(axis.high); e += step) for (const m of marks) {
      const v = m * 10 ** e;
      if (Math.log10(v) >= axis.low && Math.log10(v) <= axis.high) found.push([v, figure(v / unit, 1)]);
    }
    return found;
  }
  const span = (axis.high - axis.low) / unit, rough = span / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= rough);
  const digits = Math.min(8, Math.max(0, -Math.floor(Math.log10(step))));
  for (let k = Math.ceil(axis.low / unit / step); k * step <= axis.high / unit; k++) {
    found.push([k * step * unit, (k * step).toFixed(digits).replace(/^-(?=0(\.0*)?$)/, '').replace(/^-/, '\u2212')]);
  }
  return found;
}

function prepare(canvas, height) {
  const width = Math.max(200, canvas.parentElement.clientWidth - 24), dpr = window.devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  if (canvas.width !== Math.round(width * dpr) || canvas.height !== Math.round(height * dpr)) {
    canvas.width = Math.round(width * dpr);
    canvas.height = Math.round(height * dpr);
  }
  const g = canvas.getContext('2d');
  g.setTransform(dpr, 0, 0, dpr, 0, 0);
  g.clearRect(0, 0, width, height);
  g.font = `11.5px ${styleOf('--font')}`;
  return {g, width, height, left: 46, right: 12, top: 10, bottom: 38};
}

function drawAxes(f, xAxis, xc, yTicks, yLabel) {
  f.left = Math.max(46, 26 + Math.max(0, ...yTicks.map(([, text]) => f.g.measureText(text).width)));
  const {g, width, height, left, right, top, bottom} = f, base = height - bottom;
  g.strokeStyle = styleOf('--line');
  g.fillStyle = styleOf('--soft');
  g.lineWidth = 1;
  g.textAlign = 'center';
  for (const [v, text] of ticks(xAxis, xc)) {
    const x = Math.round(left + xAxis.share(v) * (width - left - right)) + 0.5;
    g.beginPath(); g.moveTo(x, top); g.lineTo(x, base); g.stroke();
    const half = g.measureText(text).width / 2 + 2;  // labels stay inside the picture
    g.fillText(text, Math.min(x, width - half), base + 15);
  }
  g.textAlign = 'right';
  for (const [share, text] of yTicks) {
    const y = Math.round(base - share * (base - top)) + 0.5;
    g.beginPath(); g.moveTo(left, y); g.lineTo(width - right, y); g.stroke();
    g.fillText(text, left - 6, y + 4);
  }
  g.textAlign = 'center';
  g.fillText(unitName(xc), left + (width - left - right) / 2, height - 6);
  if (yLabel) { g.save(); g.translate(11, top + (base - top) / 2); g.rotate(-Math.PI / 2); g.fillText(yLabel, 0, 0); g.restore(); }
}

const BINS = 44;
let histogram = null;
function drawHistogram(brush) {
  const c = columns.get(state.hist), f = prepare($('hist'), 236), axis = axisOf(c, ...finiteRange(c));
  const all = new Array(BINS).fill(0), some = new Array(BINS).fill(0);
  for (let i = 0; i < n; i++) {
    if (c.values[i] === null) continue;
    const bin = Math.min(BINS - 1, Math.max(0, Math.floor(axis.share(c.values[i]) * BINS)));
    all[bin]++;
    if (shown.has(i)) some[bin]++;
  }
  const most = Math.max(1, ...all);
  const step = most <= 4 ? 1 : [1, 2, 5, 10].map(m => m * 10 ** Math.floor(Math.log10(most / 4))).find(s => s >= most / 4);
  const yTicks = [];
  for (let v = 0; v <= most; v += step) yTicks.push([v / most, String(v)]);
  drawAxes(f, axis, c, yTicks, 'samples');
  const {g, width, height, left, right, top, bottom} = f, base = height - bottom, span = width - left - right;
  for (const [counts, colour] of [[all, styleOf('--faint')], [some, styleOf('--accent')]]) {
    g.fillStyle = colour;
    counts.forEach((count, b) => {
      const h = count / most * (base - top);
      if (count) g.fillRect(left + b / BINS * span + 0.5, base - Math.max(h, 1), span / BINS - 1, Math.max(h, 1));
    });
  }
  drawBrush(f, axis, null, brush || (state.ranges.has(c.key) ? {range: state.ranges.get(c.key)} : null));
  histogram = {f, axis, c, all, some};
  $('hist').setAttribute('aria-label', `Histogram of ${unitName(c)}: ${view.length} of ${n} samples shown`);
}

function drawBrush(f, xAxis, yAxis, brush) {
  if (!brush) return;
  const {g, width, height, left, right, top, bottom} = f, span = width - left - right;
  let {x0, x1, y0 = top, y1 = height - bottom} = brush;
  if (brush.range) {
    const edge = v => left + Math.min(1, Math.max(0, xAxis.share(v))) * span;
    [x0, x1] = [brush.range[0] === -Infinity ? left : edge(brush.range[0]), brush.range[1] === Infinity ? width - right : edge(brush.range[1])];
  }
  g.fillStyle = styleOf('--brush');
  g.strokeStyle = styleOf('--accent');
  g.fillRect(x0, y0, x1 - x0, y1 - y0);
  g.strokeRect(x0, y0, x1 - x0, y1 - y0);
}

let scatter = null, points = null;
function drawScatter() {
  const xc = columns.get(state.x), yc = columns.get(state.y), f = prepare($('scatter'), 266), both = data.start.diagonal && state.x === data.start.x && state.y === data.start.y;
  const xAxis = axisOf(xc, ...finiteRange(xc, both ? [xc, yc] : undefined)), yAxis = axisOf(yc, ...finiteRange(yc, both ? [xc, yc] : undefined));
  drawAxes(f, xAxis, xc, ticks(yAxis, yc).map(([v, text]) => [yAxis.share(v), text]), unitName(yc));
  const {g, width, height, left, right, top, bottom} = f, base = height - bottom;
  const px = new Float32Array(n).fill(NaN), py = new Float32Array(n), groups = new Map();
  for (let i = 0; i < n; i++) {
    if (xc.values[i] === null || yc.values[i] === null) continue;
    px[i] = left + xAxis.share(xc.values[i]) * (width - left - right);
    py[i] = base - yAxis.share(yc.values[i]) * (base - top);
    const group = !shown.has(i) ? -1 : data.labels ? data.labels[i] % 10 : 0;
    if (!groups.has(group)) groups.set(group, []);
    groups.get(group).push(i);
  }
  if (both) {
    g.strokeStyle = styleOf('--soft'); g.setLineDash([4, 4]); g.beginPath(); g.moveTo(left, base); g.lineTo(width - right, top); g.stroke(); g.setLineDash([]);
  }
  const radius = n > 3000 ? 2 : n > 800 ? 2.6 : 3.2;
  for (const group of [...groups.keys()].sort((a, b) => a - b)) {
    g.fillStyle = group < 0 ? styleOf('--faint') : styleOf(`--c${group}`);
    g.globalAlpha = group < 0 ? 0.6 : 0.78;
    g.beginPath();
    for (const i of groups.get(group)) { g.moveTo(px[i] + radius, py[i]); g.arc(px[i], py[i], radius, 0, 7); }
    g.fill();
  }
  g.globalAlpha = 1;
  points = document.createElement('canvas');
  points.width = $('scatter').width;
  points.height = $('scatter').height;
  points.getContext('2d').drawImage($('scatter'), 0, 0);
  scatter = {f, xAxis, yAxis, xc, yc, px, py};
  overScatter();
  $('scatter').setAttribute('aria-label', `${unitName(yc)} against ${unitName(xc)}, ${view.length} of ${n} samples shown. Arrow keys go from sample to sample; the ranges of the measures can also be typed beside the histogram.`);
}

function overScatter(brush) {
  if (!scatter) return;
  const {f, px, py} = scatter, {g, width, height} = f;
  g.clearRect(0, 0, width, height);
  g.drawImage(points, 0, 0, width, height);
  const i = state.current;
  if (i >= 0 && px[i] === px[i]) {
    g.strokeStyle = styleOf('--ink'); g.lineWidth = 2;
    g.beginPath(); g.arc(px[i], py[i], 6.5, 0, 7); g.stroke(); g.lineWidth = 1;
  }
  drawBrush(f, null, null, brush);
}

function nearestPoint(x, y, most = 14) {
  let best = -1, least = most * most;
  for (let i = 0; i < n; i++) {
    const d = (scatter.px[i] - x) ** 2 + (scatter.py[i] - y) ** 2;
    if (d < least && (shown.has(i) || best < 0)) { least = d; best = i; }
  }
  return best;
}

function tip(event, ...children) {
  const node = $('tip');
  node.replaceChildren(...children.filter(Boolean));
  node.hidden = false;
  const box = node.getBoundingClientRect();
  node.style.left = `${Math.max(4, Math.min(event.clientX + 14, window.innerWidth - box.width - 8))}px`;
  node.style.top = `${Math.max(4, Math.min(event.clientY + 14, window.innerHeight - box.height - 8))}px`;
}
const noTip = () => { $('tip').hidden = true; };

function sampleTip(event, i) {
  const lines = data.columns.slice(0, 6).map(c => el('div', {}, el('span', {class: 'soft'}, unitName(c) + ' '), show(c, i)));
  const text = data.thumbs ? null : plain(i, 120);
  tip(event, picture(i, 72), el('div', {}, el('b', {}, data.ids[i]), ' ', tag(data.labels ? data.labels[i] : null), text ? el('div', {class: 'soft'}, text) : null, ...lines));
}

// Dragging on a canvas: `move` while it lasts, `done` with the rectangle, or `click` where it did not move.
function draggable(canvas, {hover, move, done, click}) {
  let start = null;
  const at = event => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  const rectangle = event => {
    const [x, y] = at(event);
    return {x0: Math.min(start[0], x), x1: Math.max(start[0], x), y0: Math.min(start[1], y), y1: Math.max(start[1], y)};
  };
  canvas.addEventListener('pointerdown', event => {
    if (event.button) return;
    start = at(event);
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener('pointermove', event => {
    if (!start) return hover(event, ...at(event));
    noTip();
    move(rectangle(event));
  });
  canvas.addEventListener('pointerup', event => {
    if (!start) return;
    const r = rectangle(event), small = r.x1 - r.x0 < 4 && r.y1 - r.y0 < 4;
    start = null;
    if (small) click(...at(event)); else done(r);
  });
  canvas.addEventListener('pointercancel', () => { start = null; refresh(); });
  canvas.addEventListener('pointerleave', noTip);
}

function startPlots() {
  draggable($('hist'), {
    hover(event, x) {
      const {f, axis, c, all, some} = histogram, b = Math.floor((x - f.left) / (f.width - f.left - f.right) * BINS);
      if (b < 0 || b >= BINS) return noTip();
      const edge = s => figure(scaled(c, axis.value(s)));
      tip(event, el('div', {}, el('b', {}, `${some[b]}${some[b] === all[b] ? '' : ' of ' + all[b]} samples`), el('div', {class: 'soft'}, `${edge(b / BINS)} to ${edge((b + 1) / BINS)} ${c.unit}`)));
    },
    move: r => drawHistogram({x0: r.x0, x1: r.x1}),
    done(r) {
      const {f, axis, c} = histogram, share = x => (x - f.left) / (f.width - f.left - f.right);
      setRange(c.key, axis.value(share(r.x0)), axis.value(share(r.x1)));
    },
    click: () => setRange(state.hist, null, null),
  });
  draggable($('scatter'), {
    hover(event, x, y) { const i = nearestPoint(x, y); if (i < 0) noTip(); else sampleTip(event, i); },
    move: overScatter,
    done(r) {
      const {f, xAxis, yAxis, xc, yc} = scatter, across = f.width - f.left - f.right, up = f.height - f.top - f.bottom;
      setRange(xc.key, xAxis.value((r.x0 - f.left) / across), xAxis.value((r.x1 - f.left) / across), true);
      setRange(yc.key, yAxis.value((f.height - f.bottom - r.y1) / up), yAxis.value((f.height - f.bottom - r.y0) / up));
    },
    click(x, y) { const i = nearestPoint(x, y); if (i >= 0) choose(i); },
  });
  $('scatter').addEventListener('keydown', event => {
    const step = {ArrowRight: 1, ArrowLeft: -1, ArrowUp: 1, ArrowDown: -1}[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const c = event.key === 'ArrowUp' || event.key === 'ArrowDown' ? scatter.yc : scatter.xc;
    const order = view.filter(i => c.values[i] !== null).sort((a, b) => c.values[a] - c.values[b] || a - b);
    const at = order.indexOf(state.current);
    if (order.length) choose(order[at < 0 ? 0 : Math.min(order.length - 1, Math.max(0, at + step))]);
  });
}
