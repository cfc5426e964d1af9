// The page of `aladin serve`, read after pair.js: a query, the pictures that it finds, its words over the chosen one.
// Every address is relative, so that the page also works behind a proxy that adds a prefix.
const KEY = "aladin-token", KEPT = 400;
const at = id => document.getElementById(id);
const shown = { query: "", image: "", asked: 0, chosen: 0, token: sessionStorage.getItem(KEY) ?? "" };
const pictures = new Map();  // image id -> promise of { url, ratio }, or of null where there is no picture

// A reply of the service; an Error with the service's own message where it refuses.
async function call(path, body = null) {
  const headers = shown.token ? { Authorization: `Bearer ${shown.token}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const reply = await fetch(path, body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers });
  if (reply.ok) return reply;
  if (reply.status === 401) askForToken();
  const told = await reply.json().catch(() => ({}));
  throw new Error(told.message ?? `the service answered with status ${reply.status}`);
}

function askForToken() {
  at("token-form").hidden = false;
  at("token").focus();
}

async function loadPicture(id) {
  try {
    const url = URL.createObjectURL(await (await call(`image/${encodeURIComponent(id)}`)).blob());
    const image = node("img", { src: url });
    await image.decode();
    return { url, ratio: image.naturalWidth / image.naturalHeight };
  } catch { return null; }
}

// A picture is loaded once; the oldest of many are let go.
function picture(id) {
  if (!pictures.has(id)) pictures.set(id, loadPicture(id));
  if (pictures.size > KEPT) {
    const [oldest, loaded] = pictures.entries().next().value;
    pictures.delete(oldest);
    loaded.then(p => p && URL.revokeObjectURL(p.url));
  }
  return pictures.get(id);
}

function fail(error) {
  at("problem").textContent = error?.message ?? "";
  at("problem").hidden = !error;
  if (error) at("status").textContent = "";
}

// The button of a picture that was found; it chooses the picture.
function hitButton(hit, place) {
  const space = node("span", { class: "al-none" }, hit.id);
  const button = node("button", {
    type: "button", class: "al-hit", "data-image": hit.id, "aria-pressed": "false", onclick: () => choose(hit.id),
    "aria-label": `picture ${hit.id}, rank ${place + 1}, score ${hit.score.toFixed(2)}`,
  }, space, node("small", {}, hit.score.toFixed(2)));
  picture(hit.id).then(p => p && space.replaceWith(node("img", { src: p.url, alt: "" })));
  return node("li", {}, button);
}

// Ask for pictures; `title` says what was asked. The answer to an older question that comes late is dropped.
async function find(ask, title) {
  const number = ++shown.asked;
  fail(null);
  at("status").textContent = "searching";
  document.querySelector(".al-found").setAttribute("aria-busy", "true");
  try {
    const found = await (await call("search", ask)).json();
    if (number !== shown.asked) return;
    at("hits").replaceChildren(...found.hits.map(hitButton));
    at("hits-section").hidden = !found.hits.length;
    at("chosen").hidden = true;
    const many = found.hits.length === 1 ? "1 picture" : `${found.hits.length} pictures`;
    at("status").textContent = `${many} ${title}, ${found.milliseconds.toFixed(0)} ms`;
    if (found.hits.length) await choose(found.hits[0].id);
  } catch (error) {
    if (number === shown.asked) fail(error);
  } finally {
    if (number === shown.asked) document.querySelector(".al-found").setAttribute("aria-busy", "false");
  }
}

function searchText(text) {
  shown.query = text;
  at("query").value = text;
  const rerank = at("rerank").value === "two" ? {} : { rerank: 0 };
  return find({ text, k: Number(at("count").value), ...rerank }, `for “${text}”`);
}

function searchLike(image) {
  return find({ image, k: Number(at("count").value) }, `like picture ${image}`);
}

// The captions that a picture finds, each a button that searches for it.
function captionList(found) {
  const rows = found.hits.map(c => node("li", {},
    node("button", { type: "button", class: "al-caption", onclick: () => searchText(c.text) }, c.text),
    node("small", {}, ` ${c.score.toFixed(2)}`)));
  return rows.length ? [node("h2", {}, "Captions of the picture"), node("ol", { class: "al-captions" }, ...rows)] : [];
}

// Show a picture: the words of the query over it, and its captions.
async function choose(image) {
  const number = ++shown.chosen;
  shown.image = image;
  for (const button of document.querySelectorAll(".al-hit"))
    button.setAttribute("aria-pressed", String(button.dataset.image === image));
  try {
    const json = async (path, body) => (await call(path, body)).json();
    const [pair, captions, own] = await Promise.all([
      shown.query ? json("pair", { text: shown.query, image }) : null, json("captions", { image, k: 5 }), picture(image)]);
    if (number !== shown.chosen) return;
    const alone = own && node("img", { class: "al-alone", src: own.url, alt: `picture ${image}` });
    const view = pair ? pairView({ ...pair, picture: own?.url, ratio: own?.ratio }) : alone;
    const like = node("button", { type: "button", id: "like", onclick: () => searchLike(image) }, "Pictures like this one");
    at("chosen").replaceChildren(
      ...[node("h2", {}, `Picture ${image}`), view, like, ...captionList(captions)].filter(o => o));
    at("chosen").hidden = false;
    at("chosen").dataset.image = image;
  } catch (error) {
    if (number === shown.chosen) fail(error);
  }
}

// Arrow keys, Home and End move among the pictures.
function move(event) {
  const buttons = [...document.querySelectorAll(".al-hit")], here = buttons.indexOf(document.activeElement);
  if (here < 0) return;
  const columns = buttons.filter(b => b.offsetTop === buttons[0].offsetTop).length;
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -here, End: buttons.length };
  if (!(event.key in steps)) return;
  event.preventDefault();
  buttons[Math.max(0, Math.min(buttons.length - 1, here + steps[event.key]))].focus();
}

// What is served, and how much may be asked.
async function about() {
  const health = await (await call("health")).json(), { limits } = health;
  at("about").textContent = `${health.pictures.toLocaleString("en")} pictures, ${health.captions.toLocaleString("en")} captions`;
  at("query").maxLength = limits.text;
  for (const option of [...at("count").options]) if (Number(option.value) > limits.k) option.remove();
  if (!at("count").options.length) at("count").append(node("option", {}, String(limits.k)));
}

at("hits").addEventListener("keydown", move);
at("form").addEventListener("submit", event => {
  event.preventDefault();
  if (at("query").value.trim()) searchText(at("query").value.trim());
});
at("token-form").addEventListener("submit", event => {
  event.preventDefault();
  shown.token = at("token").value.trim();
  sessionStorage.setItem(KEY, shown.token);
  pictures.clear();
  at("token-form").hidden = true;
  fail(null);
  at("query").focus();
  if (at("query").value.trim()) searchText(at("query").value.trim());
});
// Another ranking or number asks again for the text in the box, once something has been asked.
const again = () => shown.query && at("query").value.trim() && searchText(at("query").value.trim());
for (const name of ["rerank", "count"]) at(name).addEventListener("change", again);
about().catch(fail);
at("query").focus();
