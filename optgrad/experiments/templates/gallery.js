"use strict";
(() => {
  const about = JSON.parse(document.getElementById("about-data").textContent);
  const { methods, places, times, noises, budgets } = about;
  const K = times.length, N = noises.length, V = about.values, M = methods.length;
  const FINE = 4, BANDS = 14, MOST = 6, SECONDS = 7, GRID = about.grid, MISSING = -32768, NONE = 255;
  const DASHES = [[], [9, 4], [2.5, 3], [9, 3, 2.5, 3], [15, 4], [5, 2, 2, 2, 2, 2]];
  const $ = (id) => document.getElementById(id);
  const byName = new Map(methods.map((method, index) => [method.name, index]));
  const cache = new Map();

  // What is shown: t is a number of `times`, between 0 and K − 1; of a method's value null is
  // the tuned one.
  const state = { place: 0, noise: 0, budget: 0, chosen: [], t: K - 1, playing: false };

  // Data ------------------------------------------------------------------------------------------

  async function inflated(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  async function landscape(index) {
    if (!cache.has(index)) {
      const raw = await inflated($(`landscape-${index}`).textContent.trim());
      const points = M * V * N * K;
      cache.set(index, {
        low: raw.subarray(0, 2 * points), high: raw.subarray(2 * points, 4 * points),
        excess: raw.subarray(4 * points, 5 * points), ground: raw.subarray(5 * points),
        tracks: new Map(),
      });
    }
    return cache.get(index);
  }

  // A run's positions, in parts of what is shown, and log10 excesses; null where there is no run.
  function track(data, method, value, noise) {
    const first = ((method * V + value) * N + noise) * K;
    if (!data.tracks.has(first)) data.tracks.set(first, decoded(data, first));
    return data.tracks.get(first);
  }

  function decoded(data, first) {
    const points = [], excess = [];
    let x = 0, y = 0, e = 0;
    for (let k = 0; k < K; k += 1) {
      const at = 2 * (first + k);
      x = (x + data.low[at] + 256 * data.high[at]) & 0xffff;
      y = (y + data.low[at + 1] + 256 * data.high[at + 1]) & 0xffff;
      e = (e + data.excess[first + k]) & 0xff;
      const [u, v] = [x, y].map((n) => (n > 32767 ? n - 65536 : n));
      const lost = u === MISSING || v === MISSING;
      if (k === 0 && (lost || e === NONE)) return null;
      points.push(lost ? null : [u / about.unit, v / about.unit]);
      excess.push(e * about.step - 12);
    }
    return { points, excess };
  }

  const place = () => places[state.place];
  const tuned = (method) => place().chosen[method] && place().chosen[method][state.budget];

  function runs() {
    const data = cache.get(state.place);
    if (!data) return [];
    return state.chosen.map((one, slot) => {
      const reason = place().left_out[methods[one.method].name];
      const value = one.value ?? tuned(one.method) ?? 0;
      const found = reason ? null : track(data, one.method, value, state.noise);
      return { ...one, slot, value, track: found, reason: found ? "" : reason || about.blind };
    });
  }

  const interpolated = (a, b, share) => a + (b - a) * share;
  function moment(run, t) {
    const whole = Math.min(Math.floor(t), K - 1), next = Math.min(whole + 1, K - 1);
    const share = t - whole, { points, excess } = run.track;
    if (!points[whole]) return null;
    const end = points[next] || points[whole];
    return {
      point: [0, 1].map((i) => interpolated(points[whole][i], end[i], share)),
      excess: interpolated(excess[whole], excess[next], share),
    };
  }
  const spentAt = (t) => {
    const whole = Math.min(Math.floor(t), K - 2);
    return interpolated(times[whole], times[whole + 1], t - whole);
  };

  // Text ------------------------------------------------------------------------------------------

  const minus = (text) => text.replace("-", "−");
  const short = (number) => minus(String(Number(number.toPrecision(2))));
  function valueText(method, value) {
    const { tunes, values } = methods[method];
    return tunes ? `${tunes} = ${short(values[value])}` : "nothing to tune";
  }
  function position(point) {
    return place().view.map(([low, high], i) => minus((low + point[i] * (high - low)).toFixed(2))).join(", ");
  }
  function excessText(excess) {
    if (excess > 11.9) return "diverged";
    return excess < -11.9 ? "−12 or less" : minus(excess.toFixed(1));
  }

  // Pictures --------------------------------------------------------------------------------------

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const sizes = new Map();

  function canvas(id) {
    const element = $(id), scale = window.devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = element;
    if (element.width !== Math.round(width * scale) || element.height !== Math.round(height * scale)) {
      element.width = Math.round(width * scale);
      element.height = Math.round(height * scale);
    }
    const context = element.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    sizes.set(id, { width, height });
    return { context, width, height };
  }

  const grounds = new Map();
  function ground(data) {
    const key = `${state.place} ${css("--low")}`;
    if (!grounds.has(key)) {
      const picture = document.createElement("canvas"), side = FINE * (GRID - 1);
      picture.width = picture.height = side;
      const context = picture.getContext("2d"), image = context.createImageData(side, side);
      const [low, high, edge] = ["--low", "--high", "--edge"].map((name) => rgb(css(name)));
      const bands = new Uint8Array(side * side);
      for (let i = 0; i < side * side; i += 1) {
        const u = (i % side) / FINE, v = Math.floor(i / side) / FINE;
        const corner = Math.floor(v) * GRID + Math.floor(u), [a, b] = [u % 1, v % 1];
        const heights = [corner, corner + GRID].map((at) => interpolated(data.ground[at], data.ground[at + 1], a));
        const here = Math.floor((interpolated(heights[0], heights[1], b) / 256) * BANDS);
        const isEdge = (i % side && bands[i - 1] !== here) || (i >= side && bands[i - side] !== here);
        bands[i] = here;
        for (let c = 0; c < 3; c += 1) {
          image.data[4 * i + c] = isEdge ? edge[c] : interpolated(low[c], high[c], here / (BANDS - 1));
        }
        image.data[4 * i + 3] = 255;
      }
      context.putImageData(image, 0, 0);
      grounds.set(key, picture);
    }
    return grounds.get(key);
  }

  function marker(context, slot, x, y, size) {
    context.beginPath();
    const corners = (list) => list.forEach(([u, v], i) => context[i ? "lineTo" : "moveTo"](x + u * size, y + v * size));
    if (slot === 0) context.arc(x, y, size, 0, 2 * Math.PI);
    if (slot === 1) corners([[-1, -1], [1, -1], [1, 1], [-1, 1]]);
    if (slot === 2) corners([[0, -1.2], [1.1, 0.9], [-1.1, 0.9]]);
    if (slot === 3) corners([[0, -1.35], [1.2, 0], [0, 1.35], [-1.2, 0]]);
    if (slot === 4) corners([[0, 1.2], [1.1, -0.9], [-1.1, -0.9]]);
    if (slot === 5) corners([[-1.2, -0.4], [-0.4, -0.4], [-0.4, -1.2], [0.4, -1.2], [0.4, -0.4], [1.2, -0.4],
      [1.2, 0.4], [0.4, 0.4], [0.4, 1.2], [-0.4, 1.2], [-0.4, 0.4], [-1.2, 0.4]]);
    context.closePath();
    context.fillStyle = css(`--c${slot}`);
    context.strokeStyle = css("--paper");
    context.lineWidth = 1.5;
    context.setLineDash([]);
    context.fill();
    context.stroke();
  }

  function line(context, slot, points, width) {
    if (points.length < 2) return;
    const stroke = (colour, thickness, dash) => {
      context.strokeStyle = colour;
      context.lineWidth = thickness;
      context.setLineDash(dash);
      context.beginPath();
      points.forEach(([x, y], i) => context[i ? "lineTo" : "moveTo"](x, y));
      context.stroke();
    };
    context.lineJoin = "round";
    stroke(css("--halo"), width + 2.5, []);
    stroke(css(`--c${slot}`), width, DASHES[slot]);
  }

  function star(context, x, y) {
    context.beginPath();
    for (let i = 0; i < 10; i += 1) {
      const angle = (Math.PI * i) / 5 - Math.PI / 2, radius = i % 2 ? 4 : 9;
      context[i ? "lineTo" : "moveTo"](x + radius * Math.cos(angle), y + radius * Math.sin(angle));
    }
    context.closePath();
    context.fillStyle = "#ffd400";
    context.strokeStyle = "#1a1a1a";
    context.lineWidth = 1;
    context.setLineDash([]);
    context.fill();
    context.stroke();
  }

  const onPaths = ([x, y], size) => [x * size.width, (1 - y) * size.height];

  function drawPaths(shown) {
    const { context, width, height } = canvas("paths");
    const data = cache.get(state.place);
    if (!data) return;
    context.imageSmoothingEnabled = true;
    context.drawImage(ground(data), 0, 0, width, height);
    const size = { width, height };
    for (const at of place().minimizers) star(context, ...onPaths(at, size));
    for (const run of shown.filter((one) => one.track)) {
      const points = [];
      for (let k = 0; k <= Math.floor(state.t) && run.track.points[k]; k += 1) points.push(run.track.points[k]);
      const now = moment(run, state.t);
      if (now) points.push(now.point);
      line(context, run.slot, points.map((at) => onPaths(at, size)), 2);
    }
    for (const run of shown.filter((one) => one.track)) {
      const now = moment(run, state.t);
      if (now) marker(context, run.slot, ...onPaths(now.point, size), 5.5);
    }
    const [x, y] = onPaths(place().start, size);
    context.beginPath();
    context.arc(x, y, 4.5, 0, 2 * Math.PI);
    context.fillStyle = "#ffffff";
    context.strokeStyle = "#1a1a1a";
    context.lineWidth = 2;
    context.setLineDash([]);
    context.fill();
    context.stroke();
    $("paths").setAttribute("aria-label", `paths on the landscape ${place().title}; their ends are in the table of values`);
  }

  function curvesFrame(shown) {
    const { width, height } = sizes.get("curves") || { width: 1, height: 1 };
    const found = shown.flatMap((run) => (run.track ? run.track.excess : []));
    const top = Math.min(6, Math.ceil(Math.max(1, ...found.filter((e) => e < 11.9)) + 0.3));
    const bottom = Math.max(-12.4, Math.min(-3, Math.floor(Math.min(0, ...found)) - 0.4));
    const left = 46, right = width - 24, above = 14, below = height - 42;
    const decades = Math.log10(times[K - 1]) + 0.3;
    return {
      left, right, above, below, top, bottom,
      x: (spent) => left + ((Math.log10(Math.max(spent, 0.5)) + 0.3) / decades) * (right - left),
      y: (excess) => below - ((Math.min(excess, top) - bottom) / (top - bottom)) * (below - above),
    };
  }

  function drawCurves(shown) {
    const { context, width, height } = canvas("curves");
    const frame = curvesFrame(shown), { left, right, above, below, x, y } = frame;
    context.font = "13px system-ui, 'DejaVu Sans', sans-serif";
    context.fillStyle = css("--ink");
    context.strokeStyle = css("--line");
    context.lineWidth = 1;
    const stroke = (x0, y0, x1, y1, dash = []) => {
      context.setLineDash(dash);
      context.beginPath();
      context.moveTo(x0, y0);
      context.lineTo(x1, y1);
      context.stroke();
    };
    const every = frame.top - frame.bottom > 8 ? 3 : 1;
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (let e = Math.ceil(frame.bottom / every) * every; e <= frame.top; e += every) {
      stroke(left, y(e), right, y(e));
      context.fillText(minus(String(e)), left - 6, y(e));
    }
    context.textAlign = "center";
    context.textBaseline = "top";
    for (let spent = 1; spent <= times[K - 1]; spent *= 10) {
      stroke(x(spent), above, x(spent), below);
      context.fillText(String(spent), x(spent), below + 5);
    }
    context.strokeStyle = css("--faint");
    for (const budget of budgets) stroke(x(budget), above, x(budget), below, [2, 4]);
    context.fillText("gradient equivalents", (left + right) / 2, height - 18);
    context.save();
    context.translate(11, (above + below) / 2);
    context.rotate(-Math.PI / 2);
    context.textBaseline = "middle";
    context.fillText("log₁₀ (f − f*)", 0, 0);
    context.restore();
    context.save();
    context.beginPath();
    context.rect(left, above - 8, width - left, below - above + 16);
    context.clip();
    const now = spentAt(state.t);
    context.strokeStyle = css("--ink");
    stroke(x(now), above, x(now), below);
    for (const run of shown.filter((one) => one.track)) {
      line(context, run.slot, run.track.excess.map((e, k) => [x(times[k]), y(e)]), 2);
    }
    for (const run of shown.filter((one) => one.track)) {
      const at = moment(run, state.t);
      marker(context, run.slot, x(now), y(at ? at.excess : 12), 5);
    }
    context.restore();
    $("curves").setAttribute("aria-label", `excess over gradient equivalents on ${place().title}, ${shown.length} methods; values are in the table`);
  }

  // The page --------------------------------------------------------------------------------------

  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  function swatch(slot) {
    const picture = make("canvas", { width: 84, height: 40 });
    picture.style.cssText = "width:42px;height:20px;border:0;aspect-ratio:auto";
    picture.setAttribute("aria-hidden", "true");
    const context = picture.getContext("2d");
    context.scale(2, 2);
    line(context, slot, [[2, 10], [40, 10]], 2);
    marker(context, slot, 21, 10, 5);
    return picture;
  }

  function setValue(index, value) {
    state.chosen[index].value = value;
    draw();
  }

  function drawChosen() {
    const list = $("chosen"), active = document.activeElement && document.activeElement.dataset.key;
    list.replaceChildren(...state.chosen.map((one, slot) => {
      const { name, values, tunes, title } = methods[one.method];
      const slider = make("input", { type: "range", min: 0, max: Math.max(values.length - 1, 0), step: 1 });
      slider.dataset.key = `slider ${name}`;
      slider.disabled = !tunes;
      slider.setAttribute("aria-label", `${name}: ${tunes || "nothing to tune"}`);
      slider.addEventListener("input", () => setValue(slot, Number(slider.value)));
      const again = make("button", { type: "button", textContent: "Tuned", disabled: !tunes });
      again.dataset.key = `tuned ${name}`;
      again.setAttribute("aria-label", `${name}: the tuned value`);
      again.addEventListener("click", () => setValue(slot, null));
      const away = make("button", { type: "button", textContent: "Remove" });
      away.setAttribute("aria-label", `Remove ${name}`);
      away.addEventListener("click", () => { state.chosen.splice(slot, 1); drawChosen(); draw(); $("search").focus(); });
      return make("li", {}, swatch(slot), make("span", { className: "name", textContent: name, title }), slider,
        make("span", { className: "text" }), again, away);
    }));
    $("legend").replaceChildren(...state.chosen.map((one, slot) =>
      make("li", {}, swatch(slot), make("span", { textContent: methods[one.method].name }))));
    const back = active && list.querySelector(`[data-key="${CSS.escape(active)}"]`);
    if (back) back.focus();
    $("add").disabled = state.chosen.length >= MOST;
    $("full").textContent = state.chosen.length >= MOST ? `${MOST} are shown; remove one first.` : "";
  }

  function drawText(shown) {
    const items = $("chosen").children;
    shown.forEach((run, slot) => {
      const item = items[slot], best = tuned(run.method), about_ = methods[run.method];
      item.querySelector("input").value = run.value;
      item.querySelector("input").setAttribute("aria-valuetext", valueText(run.method, run.value));
      const edge = best === 0 || best === about_.values.length - 1 ? ", at the edge of what was tried" : "";
      const is = run.value === best && about_.tunes ? ` (tuned${edge})` : "";
      item.querySelector(".text").textContent = run.reason ? `not here: ${run.reason}` : valueText(run.method, run.value) + is;
    });
    $("values").replaceChildren(...shown.map((run) => {
      const now = run.track && moment(run, state.t);
      const cells = run.track
        ? [valueText(run.method, run.value), now ? position(now.point) : "not finite", excessText(now ? now.excess : 12)]
        : ["–", "–", "not here"];
      return make("tr", {}, make("th", { scope: "row", textContent: methods[run.method].name }),
        ...cells.map((textContent) => make("td", { textContent })));
    }));
    $("time").value = state.t;
    $("clock").textContent = `${Math.round(spentAt(state.t))} gradient equivalents`;
    $("time").setAttribute("aria-valuetext", $("clock").textContent);
    $("play").textContent = state.playing ? "Pause" : "Play";
    $("play").setAttribute("aria-pressed", String(state.playing));
  }

  function drawAbout() {
    const { text, source, noises: deviations, own_noise } = place();
    $("about").textContent = `${place().title}: ${text}. Source: ${source}. Tuned with noise: ${noises[own_noise]}` +
      (state.noise === own_noise ? "." : "; the noise that is shown is another, and nothing was tuned for it.");
    noises.forEach((name, i) => {
      $(`noise-${i}-label`).textContent = i ? `${name} (σ ${short(deviations[i])})` : name;
      $(`noise-${i}`).checked = i === state.noise;
    });
    $("landscape").value = String(state.place);
    $("budget").value = String(state.budget);
  }

  function draw() {
    const shown = runs();
    drawPaths(shown);
    drawCurves(shown);
    drawText(shown);
    drawAbout();
    if (!state.playing) keep();
  }

  async function showPlace() {
    await landscape(state.place);
    draw();
  }

  function drawList() {
    const wanted = $("search").value.trim().toLowerCase(), selected = $("list").value;
    const matches = (m) => `${m.name} ${m.title} ${m.family}`.toLowerCase().includes(wanted);
    const families = [...new Set(methods.map((m) => m.family))];
    $("list").replaceChildren(...families.flatMap((family) => {
      const found = methods.filter((m) => m.family === family && matches(m));
      if (!found.length) return [];
      const group = make("optgroup", { label: family });
      group.append(...found.map((m) => make("option", { value: m.name, textContent: m.name, title: m.title })));
      return [group];
    }));
    $("list").value = selected;
    if ($("list").selectedIndex < 0) $("list").selectedIndex = 0;
  }

  function add() {
    const method = byName.get($("list").value);
    if (method === undefined || state.chosen.length >= MOST) return;
    if (state.chosen.some((one) => one.method === method)) {
      $("full").textContent = `${methods[method].name} is shown already.`;
      return;
    }
    state.chosen.push({ method, value: null });
    drawChosen();
    draw();
  }

  // The address keeps what is shown ---------------------------------------------------------------

  function keep() {
    const chosen = state.chosen.map((one) => methods[one.method].name + (one.value === null ? "" : `:${one.value}`));
    const parts = { landscape: place().name, noise: noises[state.noise], budget: budgets[state.budget], methods: chosen.join(","), t: Number(state.t.toFixed(2)) };
    const hash = `#${Object.entries(parts).map(([key, value]) => `${key}=${value}`).join("&")}`;
    if (hash !== location.hash) history.replaceState(null, "", hash);
  }

  function restore() {
    const parts = new URLSearchParams(location.hash.slice(1));
    const index = (list, value, otherwise) => (list.includes(value) ? list.indexOf(value) : otherwise);
    state.place = index(places.map((p) => p.name), parts.get("landscape"), 0);
    state.noise = index(noises, parts.get("noise"), place().own_noise);
    state.budget = index(budgets.map(String), parts.get("budget"), about.shown);
    const t = Number(parts.get("t") ?? K - 1);
    state.t = t >= 0 && t <= K - 1 ? t : K - 1;
    const named = parts.get("methods") === null ? about.first : parts.get("methods").split(",");
    const seen = new Set();
    state.chosen = named.map((text) => text.split(":")).flatMap(([name, value]) => {
      const method = byName.get(name);
      if (method === undefined || seen.has(name)) return [];
      seen.add(name);
      const number = Number(value);
      const known = value !== undefined && Number.isInteger(number) && number >= 0 && number < methods[method].values.length;
      return [{ method, value: known ? number : null }];
    }).slice(0, MOST);
  }

  // Playing ---------------------------------------------------------------------------------------

  let last = null;
  function frame(now) {
    if (!state.playing) return;
    if (last !== null) state.t = Math.min(K - 1, state.t + ((now - last) / 1000 / SECONDS) * (K - 1));
    last = now;
    if (state.t >= K - 1) state.playing = false;
    draw();
    if (state.playing) requestAnimationFrame(frame);
  }
  function play(wanted) {
    state.playing = wanted;
    last = null;
    if (wanted && state.t >= K - 1) state.t = 0;
    draw();
    if (wanted) requestAnimationFrame(frame);
  }

  // The mouse -------------------------------------------------------------------------------------

  function hover(event, lines) {
    const box = $("hover");
    box.hidden = !lines;
    if (!lines) return;
    box.textContent = lines;
    const { offsetWidth: width, offsetHeight: height } = box;
    box.style.left = `${Math.max(4, Math.min(event.clientX + 14, window.innerWidth - width - 6))}px`;
    box.style.top = `${Math.max(4, Math.min(event.clientY + 14, window.innerHeight - height - 6))}px`;
  }
  const nameAndValue = (run) => `${methods[run.method].name}, ${valueText(run.method, run.value)}`;

  function nearest(x, y, placed) {
    let best = { distance: 22 };
    for (const run of runs().filter((one) => one.track)) {
      for (let k = 0; k <= state.t + 1e-9; k += 1) {
        const at = placed(run, k);
        const distance = at ? Math.hypot(at[0] - x, at[1] - y) : Infinity;
        if (distance < best.distance) best = { distance, run, k };
      }
    }
    return best.run ? best : null;
  }
  const at = (event) => {
    const box = event.target.getBoundingClientRect();
    return [event.clientX - box.left - event.target.clientLeft, event.clientY - box.top - event.target.clientTop];
  };

  $("paths").addEventListener("mousemove", (event) => {
    const [x, y] = at(event), size = sizes.get("paths"), data = cache.get(state.place);
    if (!data) return;
    const found = nearest(x, y, (run, k) => run.track.points[k] && onPaths(run.track.points[k], size));
    const where = [x / size.width, 1 - y / size.height];
    if (where.some((u) => u < 0 || u >= 1)) return;
    const { lowest, highest } = place();
    const cell = Math.min(GRID - 1, Math.floor((1 - where[1]) * GRID)) * GRID + Math.min(GRID - 1, Math.floor(where[0] * GRID));
    const ground_ = interpolated(lowest, highest, data.ground[cell] / 255);
    hover(event, found
      ? `${nameAndValue(found.run)}\nspent ${times[found.k]}\nat (${position(found.run.track.points[found.k])})\nlog₁₀ (f − f*) ${excessText(found.run.track.excess[found.k])}`
      : `(${position(where)})\nlog₁₀ (f − f*) ${data.ground[cell] ? "" : "≤ "}${minus(ground_.toFixed(1))}`);
  });
  $("curves").addEventListener("mousemove", (event) => {
    const [x, y] = at(event), frame_ = curvesFrame(runs());
    let best = { distance: 22 };
    for (const run of runs().filter((one) => one.track)) {
      run.track.excess.forEach((e, k) => {
        const distance = Math.hypot(frame_.x(times[k]) - x, frame_.y(e) - y);
        if (distance < best.distance) best = { distance, run, k };
      });
    }
    hover(event, best.run && `${nameAndValue(best.run)}\nspent ${times[best.k]}\nlog₁₀ (f − f*) ${excessText(best.run.track.excess[best.k])}`);
  });
  for (const id of ["paths", "curves"]) $(id).addEventListener("mouseleave", (event) => hover(event, ""));

  // The beginning ---------------------------------------------------------------------------------

  $("landscape").append(...places.map((p, i) => make("option", { value: i, textContent: p.title })));
  $("budget").append(...budgets.map((b, i) => make("option", { value: i, textContent: `${b} gradient equivalents` })));
  $("noises").append(...noises.map((name, i) => {
    const radio = make("input", { type: "radio", name: "noise", id: `noise-${i}`, value: i });
    radio.addEventListener("change", () => { state.noise = i; draw(); });
    return make("label", {}, radio, " ", make("span", { id: `noise-${i}-label`, textContent: name }));
  }));
  $("notes").append(...about.notes.map((textContent) => make("li", { textContent })));
  $("time").max = K - 1;
  $("landscape").addEventListener("change", () => {
    state.place = Number($("landscape").value);
    state.noise = place().own_noise;
    showPlace();
  });
  $("budget").addEventListener("change", () => { state.budget = Number($("budget").value); draw(); });
  $("time").addEventListener("input", () => { state.playing = false; state.t = Number($("time").value); draw(); });
  $("play").addEventListener("click", () => play(!state.playing));
  $("search").addEventListener("input", drawList);
  for (const id of ["search", "list"]) {
    $(id).addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); add(); } });
  }
  $("list").addEventListener("dblclick", add);
  $("add").addEventListener("click", add);
  window.addEventListener("hashchange", () => { restore(); drawChosen(); showPlace(); });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawChosen(); draw(); });
  new ResizeObserver(() => draw()).observe($("paths"));
  restore();
  drawList();
  drawChosen();
  showPlace().then(() => { document.documentElement.dataset.ready = "true"; });
})();
