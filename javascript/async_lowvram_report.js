/*
 * "Copy report": everything a person needs who is to help, as Markdown, and nothing that is nobody's business.
 *
 * Invariant: no prompts, no paths, no addresses, no names of computers. The server leaves them out; scrub() is a second fence, over every
 * string, whatever it was made from. Only settings of a list are taken, and of the WebUI's foot line only versions. It is
 * in English, whatever the page is in: it is for whoever helps.
 */
"use strict";
window.asyncLowvram = window.asyncLowvram || {};
(function(ours) {
    const h = (...given) => ours.element(...given);

    /** The WebUI's settings that change what the mover does or how fast it is. */
    const SETTINGS = [
        "batch_cond_uncond", "pad_cond_uncond", "s_min_uncond", "cross_attention_optimization", "upcast_attn", "fp8_storage",
        "cache_fp16_weight", "auto_vae_precision", "token_merging_ratio", "hypertile_enable_unet", "sd_checkpoints_limit",
        "sd_checkpoints_keep_in_cpu", "live_previews_enable", "show_progress_every_n_steps", "show_progress_type",
        "live_preview_allow_lowvram_full",
    ];
    const FOOT = ["version", "python", "torch", "xformers", "gradio"];
    const NOT_TOLD = /prompt|path|file|dir$|url|host_?name|user/i;

    /** `text` without what a report must not hold. */
    ours.scrub = function(text) {
        let clean = String(text);
        for (const box of document.querySelectorAll("[id$=_prompt] textarea, [id$=_neg_prompt] textarea")) {
            const prompt = box.value.trim();
            if (prompt.length >= 8) clean = clean.split(prompt).join("<prompt>");
        }
        clean = clean.replace(/\b[a-z][a-z0-9+.-]*:\/\/[^\s"'<>)]+/gi, "<address>");
        // Absolute paths of either kind, at the start or after a space, a quote or the like.
        clean = clean.replace(/(['"`])(?:[A-Za-z]:)?[\\/][^'"`\n]*\1/g, "$1<path>$1");
        clean = clean.replace(/(^|[\s'"`(=:,[])(?:[A-Za-z]:)?[\\/][^\s'"`:,;()<>\]]*[^\s'"`:,;()<>\].]/g, "$1<path>");
        // What follows a space in one, and relative ones: a word with a backslash, or with a slash and a file's ending.
        clean = clean.replace(/[^\s'"`(]*\\[^\s'"`:,;)]*/g, "<path>").replace(/[^\s'"`(=:,]+\/[^\s'"`:,;)]*\.[a-z]\w+/gi, "<path>");
        const name = location.hostname;
        if (name && name !== "localhost" && name.length > 3) clean = clean.split(location.host).join("<host>").split(name).join("<host>");
        return clean;
    };

    /** Every figure of `value` as lines "key.key: figure". */
    function flatten(value, key, lines) {
        if (Array.isArray(value)) value.forEach((item, index) => flatten(item, `${key}.${index}`, lines));
        else if (value !== null && typeof value === "object") {
            for (const [name, item] of Object.entries(value)) {
                if (typeof item === "string" && NOT_TOLD.test(name)) continue;
                flatten(item, key ? `${key}.${name}` : name, lines);
            }
        } else lines.push(`${key}: ${value === null ? "not known" : value}`);
    }

    function hostLine() {
        const foot = document.querySelector(".versions");
        const words = foot ? foot.textContent.split("\u2022").map((part) => part.trim().replace(/\s+/g, " ")) : [];
        return words.filter((part) => FOOT.includes(part.split(":")[0])).join(", ") || "not known";
    }

    /** The report on `model` (async_lowvram_client.js). */
    ours.reportText = function(model) {
        const status = model.status || {}, state = ours.stateOf(model);
        const or = (value) => value || "not known", reason = status.reason ? `: ${status.reason}` : "";
        const lines = [
            "### Async LowVRAM report", "", `- version: ${or(status.version)}, schema ${or(status.schema)}`, `- host: ${hostLine()}`,
            `- device: ${or(status.device)}`, `- state: ${state.kind}${reason}`,
        ];
        if (status.restart) lines.push(`- restart: ${status.restart}`);
        lines.push(`- browser: ${navigator.userAgent}`);
        lines.push(`- window: ${window.innerWidth}x${window.innerHeight} at ${window.devicePixelRatio}`);
        for (const advice of ours.advices(status, true)) lines.push(`- advice: ${advice}`);
        const options = window.opts && typeof window.opts === "object" ? window.opts : {};
        const names = Object.keys(options).filter((name) => name.startsWith("async_lowvram") || SETTINGS.includes(name));
        lines.push("", "#### Settings", "", "```");
        for (const name of names.sort()) if (typeof options[name] !== "object") lines.push(`${name}: ${options[name]}`);
        lines.push("```", "", "#### Messages, newest first", "", "```");
        for (const one of ours.messagesOf(status, true)) {
            const at = one.at === null ? "" : `${new Date(one.at * 1000).toISOString()} `;
            lines.push(`${at}${one.level}: ${one.text}${one.count > 1 ? ` (${one.count} times)` : ""}`);
        }
        const figures = {...status};
        for (const told of ["messages", "advices", "advice", "version", "schema", "reason", "restart"]) delete figures[told];
        lines.push("```", "", "#### Figures", "", "```");
        flatten(figures, "", lines);
        lines.push("```", "");
        // A fence of three backticks inside would end ours.
        return lines.map((line) => (line === "```" ? line : ours.scrub(line).replace(/```/g, "'''").replace(/[\r\n]+/g, " "))).join("\n");
    };

    /** Whether `text` got to the clipboard. Outside https and localhost there is no navigator.clipboard; the old way needs a selection. */
    async function toClipboard(text, box) {
        if (window.isSecureContext && navigator.clipboard) {
            try {
                await navigator.clipboard.writeText(text);
                return true;
            } catch {
                // refused by the browser's settings: the old way may still be allowed
            }
        }
        ours.show(box, true);
        box.focus();
        box.select();
        try {
            return document.execCommand("copy");
        } catch {
            return false;
        }
    }

    /** The button and what it leaves: {root, buttons}. */
    ours.makeReport = function(getModel) {
        const {t} = ours;
        const button = h("button", {type: "button", className: "alv-button", "data-do": "report"}, [t("Copy report")]);
        const said = h("span", {className: "alv-said", role: "status"});
        const box = h("textarea", {className: "alv-report", readOnly: true, rows: 10, hidden: true, "aria-label": t("Report")});
        button.addEventListener("click", async() => {
            box.value = ours.reportText(getModel());
            const copied = await toClipboard(box.value, box);
            ours.show(box, !copied);
            if (copied) button.focus();
            else box.select();
            ours.setText(said, copied ? t("Copied") : t("The browser does not allow it: copy the text below by hand"));
        });
        return {root: box, buttons: [button, said]};
    };
})(window.asyncLowvram);
