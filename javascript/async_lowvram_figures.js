/*
 * What the status means, in words and numbers: pure functions from the server's JSON to what the panel and the report show.
 *
 * Invariants: nothing here touches the page; a figure that is not known makes no claim - its part of the line is left out, its row shows
 * a dash. Passes are the UNet's: while another network is in use, speed and limit are left out instead of being another network's.
 */
"use strict";
window.asyncLowvram = window.asyncLowvram || {};
(function(ours) {
    /** Whether a trial is under way. In its turns of stock the extension stands down, which is nothing to report. */
    ours.tries = (status) => Boolean(status && status.trial && status.trial.state === "running");

    /** The state as {kind, text}; kind: active | learning | trial | standing_down | demoted | missing | unreachable | asking. */
    ours.stateOf = function(model) {
        const {t} = ours, status = model.status;
        if (model.problem === "missing") {
            const text = t("Not there: this WebUI has no Async LowVRAM running. Restart it, or look at its console for why");
            return {kind: "missing", text};
        }
        if (model.problem === "unreachable") {
            const code = model.code ? ` (HTTP ${model.code})` : "";
            return {kind: "unreachable", text: t("No answer from the WebUI") + code};
        }
        if (!status) return {kind: "asking", text: t("Asking the WebUI ...")};
        if (ours.tries(status)) return {kind: "trial", text: t("Trial: stock and async moving in turn")};
        const reason = typeof status.reason === "string" && status.reason ? t(status.reason) : t("no reason given");
        switch (status.state) {
        case "active": return {kind: "active", text: t("On: weights travel while the GPU computes")};
        case "learning": return {
            kind: "learning",
            text: status.generating ? t("Learning: the first step of each network is watched")
                : t("Ready: learns from the first step of the next picture"),
        };
        case "standing_down": return {kind: "standing_down", text: t("Standing down: {reason}", {reason})};
        case "demoted": return {kind: "demoted", text: t("Gave way to stock: {reason}", {reason})};
        default: return {kind: "demoted", text: t("A state this page does not know: reload the page")};
        }
    };

    /** Whether there is more to show than the reason: figures, timeline, trial. */
    ours.works = (status) => Boolean(status) && (["active", "learning"].includes(status.state) || ours.tries(status));

    const ofUnet = (status) => !status.network || /^unet/i.test(status.network);

    /** The line's figures, those that are known: [{id, text, hint}]. */
    ours.lineFigures = function(status) {
        const {t} = ours, found = [];
        if (!ours.works(status) || ours.tries(status) || !ofUnet(status)) return found;
        if (ours.positive(status.pass_seconds)) {
            found.push({id: "speed", text: ours.speed(status.pass_seconds), hint: t("UNet passes per second, as last measured")});
            if (ours.positive(status.stock_pass_seconds)) {
                const times = ours.times(status.stock_pass_seconds / status.pass_seconds);
                const hint = t("against the stock moves, as “Try it” last measured them");
                found.push({id: "stock", text: t("{times} times stock", {times}), hint});
            }
        }
        if (ours.positive(status.efficiency)) {
            // More than all of it: how long computing takes was learned when the device was busier.
            const percent = ours.percent(Math.min(1, status.efficiency));
            const hint = t("of the fastest that this GPU and its bus allow at this budget");
            found.push({id: "limit", text: t("{percent} of the limit", {percent}), hint});
        }
        return found;
    };

    /**
     * The bar of device memory: {parts: [{id, label, bytes, share}], whole, budget, budgetShare, sentence}, or null where nothing is known.
     * Shares are of the whole device, or of what is known to be there where its size is not.
     */
    ours.vramOf = function(status) {
        const {t} = ours, vram = status && status.vram;
        if (!vram || typeof vram !== "object") return null;
        const labels = [
            ["resident", t("weights that stay")], ["ring", t("weights on their way")], ["activations", t("pictures in the making")],
            ["others", t("others")], ["free", t("free")],
        ];
        const sum = labels.reduce((total, [id]) => total + (ours.positive(vram[id]) ? vram[id] : 0), 0);
        const total = ours.positive(vram.total) ? vram.total : null;
        const budget = ours.positive(vram.budget) ? vram.budget : null;
        const whole = Math.max(total || 0, sum, total ? 0 : budget || 0);
        if (!whole) return null;
        const parts = labels.map(([id, label]) => ({
            id, label, bytes: ours.known(vram[id]) ? vram[id] : null, share: ours.positive(vram[id]) ? vram[id] / whole : 0,
        }));
        const words = parts.map((part) => `${part.label} ${part.bytes === null ? t("not known") : ours.bytes(part.bytes)}`);
        if (budget) words.push(t("budget for weights {size}", {size: ours.bytes(budget)}));
        const sentence = (total ? t("of {size}", {size: ours.bytes(total)}) + ": " : "") + words.join(", ");
        return {parts, total, whole, budget, budgetShare: budget ? Math.min(1, budget / whole) : null, sentence};
    };

    /** Bars of a pass's time: [{id, label, seconds, share, note}], share of the longest; rows of unknown time have seconds null. */
    ours.passBars = function(status) {
        const {t} = ours;
        const mine = ours.positive(status.pass_seconds) ? status.pass_seconds : null;
        const rows = [
            {id: "pass", label: t("This pass"), seconds: mine},
            {id: "best", label: t("Best schedule"), seconds: status.best_schedule_seconds},
            {id: "limit", label: t("Limit"), seconds: status.limit_seconds},
            {id: "stock", label: t("Stock"), seconds: status.stock_pass_seconds},
        ].map((row) => ({...row, seconds: ours.positive(row.seconds) ? row.seconds : null, note: ""}));
        const longest = Math.max(0, ...rows.map((row) => row.seconds || 0));
        for (const row of rows) row.share = row.seconds ? row.seconds / longest : 0;
        const reached = (share) => (ours.positive(share) ? t("{percent} reached", {percent: ours.percent(Math.min(1, share))}) : "");
        rows[1].note = reached(status.schedule_efficiency);
        rows[2].note = reached(status.efficiency);
        if (rows[3].seconds && mine) rows[3].note = t("{times} times", {times: ours.times(rows[3].seconds / mine)});
        else if (!rows[3].seconds) rows[3].note = t("“Try it” measures it");
        return rows;
    };

    /** Rows of the table: [{id, label, text}]; text is a dash where the figure is not known. */
    ours.facts = function(status) {
        const {t, bytes, seconds, rate, known, UNKNOWN} = ours, rows = [];
        const row = (id, label, text) => rows.push({id, label, text});
        const measured = ours.positive(status.pass_seconds);
        row("stall", t("GPU waits per step"), measured ? seconds(status.stall_seconds) : UNKNOWN);
        const bound = {copy: t("copies"), compute: t("computing")}[status.bound];
        row("bound", t("Held up by"), bound || UNKNOWN);
        const worst = status.worst_stall;
        row("worst", t("Longest wait"), worst && known(worst.seconds) ? `${seconds(worst.seconds)} · ${worst.unit}` : UNKNOWN);
        const size = (value) => (ours.positive(value) ? bytes(value) : UNKNOWN);
        row("streamed", t("Weights moved per step"), size(status.streamed_bytes_per_pass));
        row("rate", t("Rate achieved"), achieved(status));
        row("host", t("Weights in main memory"), size(status.host_bytes));
        const pinned = known(status.pinned_bytes) ? bytes(status.pinned_bytes) : UNKNOWN;
        const most = size(status.pinned_limit_bytes);
        row("pinned", t("Pinned memory"), most === UNKNOWN ? pinned : t("{size} of at most {most}", {size: pinned, most}));
        if (status.disk && known(status.disk.read_bytes)) {
            const speed = ours.positive(status.disk.bytes_per_s) ? ` · ${rate(status.disk.bytes_per_s)}` : "";
            row("disk", t("Read from disk"), bytes(status.disk.read_bytes) + speed);
        }
        row("previews", t("Live previews"), previews(status.preview));
        row("device", t("Device"), typeof status.device === "string" && status.device ? status.device : UNKNOWN);
        row("version", t("Version"), typeof status.version === "string" && status.version ? status.version : UNKNOWN);
        return rows;
    };

    /** What the passes moved in the time they took, beside what the bus carries. */
    function achieved(status) {
        const link = ours.rate(status.bandwidth_bytes_per_s);
        if (!ours.positive(status.pass_seconds) || !ours.positive(status.streamed_bytes_per_pass)) {
            return link === ours.UNKNOWN ? link : ours.t("{n} possible", {n: link});
        }
        const now = ours.rate(status.streamed_bytes_per_pass / status.pass_seconds);
        return link === ours.UNKNOWN ? now : ours.t("{now} of {link}", {now, link});
    }

    function previews(counted) {
        if (!counted || !ours.known(counted.decoded)) return ours.UNKNOWN;
        const {t} = ours, words = [t("{n} shown", {n: counted.decoded})];
        if (ours.positive(counted.skipped)) words.push(t("{n} skipped", {n: counted.skipped}));
        if (ours.positive(counted.errors)) words.push(t("{n} failed", {n: counted.errors}));
        if (ours.positive(counted.decoded) && ours.positive(counted.decode_seconds)) {
            words.push(t("{time} each", {time: ours.seconds(counted.decode_seconds / counted.decoded)}));
        }
        return words.join(", ");
    }

    const asItIs = (text, values) => ours.fill(text, values);

    /** The advice: sentences in the user's language (or as they are, for a report), the most useful first. */
    ours.advices = function(status, plain) {
        const t = plain ? asItIs : ours.t;
        const given = Array.isArray(status.advices) ? status.advices.filter((advice) => advice && typeof advice.text === "string") : [];
        if (!given.length) return typeof status.advice === "string" && status.advice ? [t(status.advice)] : [];
        return given.map((advice) => {
            const values = {};
            for (const [key, value] of Object.entries(advice.values || {})) values[key] = typeof value === "string" ? t(value) : value;
            return t(advice.text, values);
        });
    };

    /** The messages, newest first: [{level, word, text, at, count}]; `plain`: not translated. */
    ours.messagesOf = function(status, plain) {
        const t = plain ? asItIs : ours.t, words = {info: t("note"), warning: t("warning"), error: t("error")};
        const given = status && Array.isArray(status.messages) ? status.messages.filter((one) => one && typeof one.text === "string") : [];
        return given.map((one) => {
            const level = Object.prototype.hasOwnProperty.call(words, one.level) ? one.level : "info";
            const at = ours.known(one.at) ? one.at : null, count = one.count > 1 ? one.count : 1;
            return {level, word: words[level], text: t(one.text), at, count};
        }).sort((a, b) => (b.at || 0) - (a.at || 0));
    };
})(window.asyncLowvram);
